"""Attention of language models: separate projections, shared key heads, keys and values that may be remembered."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.attention import attend
from research.layers.dense import Dense
from research.layers.drop import Dropout
from research.layers.norm import accumulation_dtype
from research.layers.rope import Rotation, rotate


class KeyValues(NamedTuple):
    """Keys and values of one layer, (B, heads, N, D) each."""

    keys: jax.Array
    values: jax.Array


class Cache(NamedTuple):
    """What a causal model remembers of the tokens it has read, in a fixed number S of slots.

    Fields:
      layers: keys and values of each layer, (B, heads, S, D).
      seen: (B, S) bool, which slots hold tokens that are no padding.
      length: () int32, how many slots are taken.
    """

    layers: tuple[KeyValues, ...]
    seen: jax.Array
    length: jax.Array


class Context(NamedTuple):
    """Where the tokens of one call stand and what they may see.

    Fields:
      positions: (B or 1, N) int32, the number of real tokens before each; -1 for padding.
      slots: (N,) int32, the slots the tokens are written to.
      visible: (B or 1, 1, N, S) bool, with S = N where nothing is remembered.
    """

    positions: jax.Array
    slots: jax.Array
    visible: jax.Array


def empty_cache(layers: int, batch: int, heads: int, slots: int, dim: int, dtype=jnp.float32) -> Cache:
    """A cache with nothing in it, for `slots` tokens."""
    zeros = jnp.zeros((batch, heads, slots, dim), dtype)
    pairs = tuple(KeyValues(zeros, zeros) for _ in range(layers))
    return Cache(pairs, jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))


def causal_context(
    count: int, mask: jax.Array | None = None, cache: Cache | None = None
) -> tuple[Context, Cache | None]:
    """What `count` new tokens see: themselves and all real tokens before them; and the cache with them noted.

    Args:
      mask: (B, count), true or 1 where a token is none of padding; None where none is.
      cache: of the tokens before.
    Returns:
      The context, and `cache` with `seen` and `length` brought up to date (its layers are the model's to fill).
    """
    new = jnp.arange(count, dtype=jnp.int32)
    if cache is None:
        seen = None if mask is None else mask.astype(bool)
        slots, columns, start = new, new, None
    else:
        own = jnp.ones((cache.seen.shape[0], count), bool) if mask is None else mask.astype(bool)
        seen = jax.lax.dynamic_update_slice(cache.seen, own, (jnp.int32(0), cache.length))
        slots, columns = cache.length + new, jnp.arange(seen.shape[1], dtype=jnp.int32)
        start = jnp.sum(cache.seen, axis=1, keepdims=True, dtype=jnp.int32)
        mask, cache = own, cache._replace(seen=seen, length=cache.length + count)
    visible = (columns[None, :] <= slots[:, None])[None, None]
    if seen is None:
        return Context(new[None], slots, visible), None
    real = mask.astype(jnp.int32)
    positions = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1 + (0 if start is None else start)
    return Context(jnp.where(real > 0, positions, -1), slots, visible & seen[:, None, None, :]), cache


def remember(past: KeyValues | None, new: KeyValues, slots: jax.Array) -> KeyValues:
    """`past` with `new` written from the first of `slots` on; `new` itself where there is no past."""
    if past is None:
        return new
    zero = jnp.int32(0)
    write = lambda old, part: jax.lax.dynamic_update_slice(old, part.astype(old.dtype), (zero, zero, slots[0], zero))
    return KeyValues(*map(write, past, new))


def mask_bias(visible: jax.Array, dtype=jnp.float32) -> jax.Array:
    """0 where `visible` and the most negative finite number elsewhere, to be added to scores.

    Finite, so that a row which sees nothing (a query of padding) has an output, though no meaning.
    """
    wide = accumulation_dtype(jnp.zeros((), dtype))
    return jnp.where(visible, jnp.zeros((), wide), jnp.asarray(jnp.finfo(wide).min, wide))


class MultiHead(nn.Module):
    """Multi-head attention in two parts: `keys_values` of what is looked at, and the call, which looks.

    `self_attn(x, self_attn.keys_values(x), bias)` is self-attention, `cross(x, cross.keys_values(memory))` attention
    to another sequence. Dense layers `q_proj`, `k_proj`, `v_proj` and `o_proj`.

    Fields:
      num_heads, head_dim: of the queries; num_kv_heads: of keys and values, a divisor of `num_heads`, each shared by
        neighbouring query heads (Ainslie et al. 2023); None for as many.
      use_bias: biases of queries, keys and values; out_bias: of the output, as `use_bias` where None.
      scaled: scores are divided by sqrt(head_dim); T5's are not.
      dropout: rate on the attention weights.
      kernel_init, query_init, out_init: initialisers; the latter two are as the first where None.
    Raises:
      ValueError: the heads of queries do not divide by those of keys.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    use_bias: bool = False
    out_bias: bool | None = None
    scaled: bool = True
    dropout: float = 0.0
    kernel_init: Callable = nn.initializers.normal(0.02)
    query_init: Callable | None = None
    out_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shared = self.num_kv_heads or self.num_heads
        if self.num_heads % shared:
            raise ValueError(f"{self.num_heads} heads of queries do not divide by num_kv_heads={shared}")
        options = {"use_bias": self.use_bias, "dtype": self.dtype}
        self.q_proj = Dense(self.num_heads * self.head_dim, kernel_init=self.query_init or self.kernel_init, **options)
        self.k_proj = Dense(shared * self.head_dim, kernel_init=self.kernel_init, **options)
        self.v_proj = Dense(shared * self.head_dim, kernel_init=self.kernel_init, **options)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim).swapaxes(-2, -3)

    def keys_values(self, x: jax.Array, rotation: Rotation | None = None) -> KeyValues:
        """Keys and values of `x` (B, N, C), the keys turned by `rotation`."""
        keys, values = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return KeyValues(keys if rotation is None else rotate(keys, rotation), values)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: KeyValues,
        bias: jax.Array | None = None,
        rotation: Rotation | None = None,
        train: bool = False,
    ) -> jax.Array:
        """What `x` (B, M, C) finds in `memory` (B, heads, N, D): (B, M, C).

        Args:
          bias: added to the scores, (B or 1, heads or 1, M, N).
          rotation: of the queries; train: drops attention weights, rng stream `dropout`.
        """
        q = self._heads(self.q_proj(x))
        y = self._look(q if rotation is None else rotate(q, rotation), memory, bias, train)
        y = y.swapaxes(-2, -3).reshape(*x.shape[:-1], -1)
        out_bias = self.use_bias if self.out_bias is None else self.out_bias
        init = self.out_init or self.kernel_init
        return Dense(x.shape[-1], use_bias=out_bias, kernel_init=init, dtype=self.dtype, name="o_proj")(y)

    def _look(self, q: jax.Array, memory: KeyValues, bias: jax.Array | None, train: bool) -> jax.Array:
        keys, values = (part.astype(q.dtype) for part in memory)
        shared, shape = keys.shape[1], q.shape
        if shared != self.num_heads:  # (B, heads, ...) as (B, heads of keys, group, ...)
            split = lambda y: y.reshape(y.shape[0], shared, -1, *y.shape[2:])
            q, keys, values = split(q), split(keys), split(values)
            if bias is not None:
                bias = bias[:, None] if bias.shape[1] == 1 else split(bias)
        scale = None if self.scaled else jnp.ones((1, 1, 1), accumulation_dtype(q))
        if train and self.dropout:
            scores = q @ keys.swapaxes(-1, -2)
            scores = scores.astype(accumulation_dtype(scores)) * (self.head_dim**-0.5 if self.scaled else 1.0)
            weights = jax.nn.softmax(scores if bias is None else scores + bias.astype(scores.dtype), axis=-1)
            y = Dropout(self.dropout)(weights, train).astype(values.dtype) @ values
        else:
            y = attend(q, keys, values, bias, scale)
        return y.reshape(shape)
