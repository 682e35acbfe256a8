"""Text from a language model, token by token, in one compiled loop of fixed shapes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.layers.norm import accumulation_dtype


def generate(
    model: nn.Module,
    variables,
    tokens,
    *,
    max_new_tokens: int,
    mask=None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    eos: int | tuple[int, ...] | None = None,
    pad: int = 0,
) -> jax.Array:
    """What follows `tokens` (B, N) int in the eyes of `model`: new tokens (B, max_new_tokens) int32.

    A causal model goes on after the last token; T5 reads `tokens` with its encoder and writes with its decoder, whose
    start token is not among the result.

    Args:
      mask: (B, N), true or 1 where a token is none of padding, which stands left of a causal model's prompts.
      temperature: 0 takes the likeliest token, more draws one from softmax(logits / temperature) by `key`.
      top_k, top_p: draw among the k likeliest tokens (0: all), and of these among the fewest whose probabilities add up
        to `top_p` (1: all), Holtzman et al. 2020.
      eos: tokens that end a text; it stays in the result and is followed by `pad`.
    Raises:
      ValueError: an option out of range, a temperature without key, a prompt that ends in padding.
    """
    _check(max_new_tokens, temperature, top_k, top_p, key)
    mask = None if mask is None else jnp.asarray(mask, bool)
    if mask is not None and not hasattr(model, "encode") and not np.all(np.asarray(mask[:, -1])):
        raise ValueError("mask: a prompt ends in padding; pad prompts on the left")
    ends = () if eos is None else tuple(np.atleast_1d(eos).tolist())
    sampled = temperature > 0
    numbers = (jnp.float32(temperature), jnp.float32(top_p), key) if sampled else None
    return _generate(
        model, max_new_tokens, top_k, top_p < 1, ends, pad, variables, jnp.asarray(tokens, jnp.int32), mask, numbers
    )


def _check(max_new_tokens, temperature, top_k, top_p, key) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: at least one")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: the first two may not be negative, and top_p "
            "lies in (0, 1]"
        )
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws tokens: give a key, or temperature=0 for the likeliest")


def restricted(logits: jax.Array, top_k: int = 0, top_p: jax.Array | None = None) -> jax.Array:
    """`logits` (B, V) with -inf outside the `top_k` likeliest and the nucleus of probability `top_p`.

    As in Hugging Face: first the k likeliest (0: all; equals of the last stay), then of their renormalised
    probabilities the fewest that add up to `top_p` or more (None: all).
    """
    out = jnp.asarray(-jnp.inf, logits.dtype)
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, out, logits)
    if top_p is None:
        return logits
    ordered = -jnp.sort(-logits, axis=-1)
    chances = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, out, logits)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _generate(model, count, top_k, nucleus, ends, pad, variables, tokens, mask, numbers):
    def choose(logits, index):
        if numbers is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        temperature, top_p, key = numbers
        logits = logits.astype(accumulation_dtype(logits))
        logits = logits / temperature.astype(logits.dtype)
        logits = restricted(logits, top_k, top_p.astype(logits.dtype) if nucleus else None)
        return jax.random.categorical(jax.random.fold_in(key, index), logits).astype(jnp.int32)

    def ended(token):
        return functools.reduce(jnp.logical_or, (token == end for end in ends), jnp.zeros(token.shape, bool))

    def more(carry):
        index, _, done, _, _ = carry
        return (index < count) & ~jnp.all(done)

    def step(carry):
        index, found, done, token, cache = carry
        logits, cache = model.apply(variables, token, cache, method="advance")
        token = jnp.where(done, jnp.int32(pad), choose(logits, index))
        found = jax.lax.dynamic_update_slice(found, token[:, None], (jnp.int32(0), index))
        return index + 1, found, done | ended(token), token, cache

    logits, cache = model.apply(variables, tokens, mask, count - 1, method="start")
    token = choose(logits, jnp.int32(0))
    found = jnp.full((tokens.shape[0], count), pad, jnp.int32).at[:, 0].set(token)
    return jax.lax.while_loop(more, step, (jnp.int32(1), found, ended(token), token, cache))[1]
