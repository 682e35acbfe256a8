"""Multi-head self-attention, in one place for all transformers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.dense import Dense
from research.layers.norm import accumulation_dtype


def attention_scores(
    q: jax.Array, k: jax.Array, bias: jax.Array | None = None, scale: jax.Array | None = None
) -> jax.Array:
    """What the softmax of `attend` is taken of, (..., heads, M, N) in float32 or better; arguments as there."""
    scores = (q if scale is not None else q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    scores = scores.astype(accumulation_dtype(scores))
    if scale is not None:
        scores = scores * _broadcast(scale, scores)
    if bias is not None:
        scores = scores + _broadcast(bias, scores)
    return scores


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, scale: jax.Array | None = None
) -> jax.Array:
    """`softmax(scale q k^T + bias) v`, with `scale` 1 / sqrt(D) by default (Vaswani et al. 2017, equation 1).

    The exponentials are normalised after they have been multiplied with the values, which divides N x D numbers a head
    instead of N x N. They are taken and summed in float32 or better.

    Args:
      q: queries (..., heads, M, D); k, v: keys and values (..., heads, N, D).
      bias: added to the scores, with trailing axes (..., heads, M, N); missing and size-1 axes are broadcast.
      scale: of the scores in place of the default, with trailing axes (heads, 1, 1).
    Returns:
      (..., heads, M, D) in the dtype of `v`.
    """
    scores = attention_scores(q, k, bias, scale)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = weights.astype(v.dtype) @ v
    return (values.astype(total.dtype) / total).astype(v.dtype)


def class_row(q: jax.Array, k: jax.Array, bias: jax.Array | None = None, scale: jax.Array | None = None) -> jax.Array:
    """The first query's row of the softmax that `attend` takes, computed again alone.

    Token reduction ranks tokens by it; that one row is cheaper than to keep all (..., heads, M, N). Arguments are those
    of `attend`, the result is (..., heads, N) in float32 or better.
    """
    q = q[..., :1, :]
    bias = bias if bias is None or bias.ndim < 2 or bias.shape[-2] == 1 else bias[..., :1, :]
    return jax.nn.softmax(attention_scores(q, k, bias, scale), axis=-1)[..., 0, :]


def _broadcast(values: jax.Array, scores: jax.Array) -> jax.Array:
    return values.astype(scores.dtype).reshape(*[1] * (scores.ndim - values.ndim), *values.shape)


class Attention(nn.Module):
    """Multi-head self-attention over the second-last axis: (..., N, C) -> (..., N, C).

    Queries, keys and values come from one dense layer `qkv` whose outputs are ordered (q k v, head, channel), and the
    heads' outputs go through another, `proj`.

    Fields:
      num_heads: heads; C must divide by it.
      qkv_bias: biases of queries, keys and values.
      key_bias: False leaves the keys without bias and holds the others as two vectors, `q_bias` and `v_bias` (BEiT).
      fused: False has three dense layers `q_proj`, `k_proj` and `v_proj` in the place of `qkv`, as some checkpoints do.
      cosine: scores are cosines times a learned factor of each head, at most 100 (Liu et al. 2022, Swin V2, equation
        2; biases are added to them as to other scores).
      kernel_init: of `qkv`, and of the output projection `proj` where `out_init` is None.
    """

    num_heads: int
    qkv_bias: bool = True
    key_bias: bool = True
    fused: bool = True
    cosine: bool = False
    kernel_init: Callable = nn.initializers.normal(0.02)
    out_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None, core: Callable | None = None):
        """`bias` is added to the scores of `attend`.

        `core(q, k, v, bias, scale) -> (values, seen)` takes the place of `attend`; the result is then (y, seen).

        Raises:
          ValueError: the channels do not divide into heads.
        """
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise ValueError(f"{channels} channels do not divide into num_heads={self.num_heads}")
        q, k, v = (self._fused if self.fused else self._separate)(x)  # each (..., heads, N, D)
        scale = None
        if self.cosine:
            scale = self.param("logit_scale", nn.initializers.constant(math.log(10.0)), (self.num_heads, 1, 1))
            q, k, scale = _normalised(q), _normalised(k), jnp.exp(jnp.minimum(scale, math.log(100.0)))
        y, seen = (attend(q, k, v, bias, scale), None) if core is None else core(q, k, v, bias, scale)
        y = y.swapaxes(-2, -3).reshape(x.shape)
        y = Dense(channels, dtype=self.dtype, kernel_init=self.out_init or self.kernel_init, name="proj")(y)
        return y if core is None else (y, seen)

    def _fused(self, x: jax.Array) -> jax.Array:
        channels, dense_bias = x.shape[-1], self.qkv_bias and self.key_bias
        qkv = Dense(3 * channels, dense_bias, self.dtype, kernel_init=self.kernel_init, name="qkv")(x)
        if self.qkv_bias and not self.key_bias:
            vectors = [self.param(name, nn.initializers.zeros, (channels,)) for name in ("q_bias", "v_bias")]
            joined = jnp.concatenate([vectors[0], jnp.zeros_like(vectors[0]), vectors[1]]).astype(qkv.dtype)
            qkv = qkv + joined.reshape(*[1] * (qkv.ndim - 1), -1)
        heads = qkv.reshape(*x.shape[:-1], 3, self.num_heads, -1)  # (..., N, 3, heads, D)
        return jnp.moveaxis(heads, (-3, -2), (0, -3))

    def _separate(self, x: jax.Array) -> list[jax.Array]:
        options = {"use_bias": self.qkv_bias, "kernel_init": self.kernel_init, "dtype": self.dtype}
        parts = [Dense(x.shape[-1], name=f"{part}_proj", **options)(x) for part in "qkv"]
        return [part.reshape(*x.shape[:-1], self.num_heads, -1).swapaxes(-2, -3) for part in parts]


def _normalised(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis; zero stays zero, as it is for keys of padding."""
    wide = x.astype(accumulation_dtype(x))
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))).astype(x.dtype)
