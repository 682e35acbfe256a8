"""What causal language models share: their parts by name, the walk through the layers, reading and writing a cache."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.multihead import Cache, causal_context, mask_bias
from research.layers.rope import Rotation


class Shared(NamedTuple):
    """What every layer is given beside its input.

    Fields:
      bias: (B or 1, 1, N, S), added to the scores; slots: (N,) int32, where keys are written in a cache.
      rotation: of queries and keys, None without rotary positions.
    """

    bias: jax.Array
    slots: jax.Array
    rotation: Rotation | None = None


def lookup(table: nn.Embed, tokens: jax.Array) -> jax.Array:
    """Rows of the table for `tokens` (B, N) int; embeddings (B, N, C) pass, cast to the table's compute dtype."""
    return table(tokens) if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens.astype(table.dtype)


class CausalModel(nn.Module):
    """Causal language model: tokens (B, N) int -> logits (B, N, vocab_size) and endpoints.

    A family gives
      embed(tokens, mask=None, cache=None): (state before the first layer (B, N, C), what all layers are given, `cache`
        with the tokens noted);
      layers: modules called as `layer(x, shared, cache, train)`, which give (state, (keys, values), routing or None);
      finish(x): the last layer's state made ready for `head`;
      head(x): logits of finished states;
      empty_cache(batch, slots): a cache for `slots` tokens of `batch` texts.
    One layer on its own is `block(model).apply({"params": params["layers_3"]}, x, shared)`, with `x` and `shared` from
    `embed`.

    Endpoints: `hidden_0` (embeddings) to `hidden_L` (B, N, C), the state after each layer; `hidden`, the one the head
    sees; `cache`, where one was given.
    """

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and endpoints.

        Args:
          tokens: (B, N) int, or embeddings (B, N, C) in their place.
          mask: (B, N), true or 1 where a token is none of padding, which may be on either side; None: all are real.
          cache: of the tokens before, with at least N free slots.
        """
        x, endpoints = self.states(tokens, mask, cache, train)
        return self.head(x), endpoints

    def states(self, tokens, mask=None, cache=None, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The states `head` turns into logits, and the endpoints; arguments as of the call."""
        x, shared, noted = self.embed(tokens, mask, cache)
        endpoints, pairs, routers = {"hidden_0": x}, [], []
        for index, layer in enumerate(self.layers):
            x, pair, router = layer(x, shared, None if cache is None else cache.layers[index], train)
            endpoints[f"hidden_{index + 1}"] = x
            pairs.append(pair)
            routers.append(router)
        endpoints["hidden"] = x = self.finish(x)
        if cache is not None:
            endpoints["cache"] = noted._replace(layers=tuple(pairs))
        if routers and routers[0] is not None:
            endpoints["router_logits"] = jnp.concatenate(routers, 1)
        return x, endpoints

    def start(self, tokens: jax.Array, mask: jax.Array | None, slots: int) -> tuple[jax.Array, Cache]:
        """Reads prompts (B, N), padded on the left: logits (B, V) of what follows, and a cache with `slots` more."""
        x, endpoints = self.states(tokens, mask, self.empty_cache(tokens.shape[0], tokens.shape[1] + slots))
        return self.head(x[:, -1]), endpoints["cache"]

    def advance(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads one more token of each text, (B,) int: logits (B, V) of what follows, and the cache."""
        x, endpoints = self.states(tokens[:, None], None, cache)
        return self.head(x[:, -1]), endpoints["cache"]


def context_of(tokens: jax.Array, mask: jax.Array | None, cache: Cache | None, dtype) -> tuple:
    """(positions (B or 1, N), bias (B or 1, 1, N, S), slots, noted cache) of a call; see `causal_context`."""
    context, noted = causal_context(tokens.shape[1], mask, cache)
    return context.positions, mask_bias(context.visible, dtype), context.slots, noted
