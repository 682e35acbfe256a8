"""Multi-head self-attention, in one place for all transformers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.dense import Dense
from research.layers.norm import accumulation_dtype


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """`softmax(q k^T / sqrt(D) + bias) v` (Vaswani et al. 2017, equation 1).

    The exponentials are normalised after they have been multiplied with the values, which divides N x D numbers a head
    instead of N x N. They are taken and summed in float32 or better.

    Args:
      q: queries (..., heads, M, D); k, v: keys and values (..., heads, N, D).
      bias: added to the scores, with trailing axes (..., heads, M, N); missing and size-1 axes are broadcast.
    Returns:
      (..., heads, M, D) in the dtype of `v`.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
    scores = scores.astype(accumulation_dtype(scores))
    if bias is not None:
        scores = scores + bias.astype(scores.dtype).reshape(*[1] * (scores.ndim - bias.ndim), *bias.shape)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = weights.astype(v.dtype) @ v
    return (values.astype(total.dtype) / total).astype(v.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over the second-last axis: (..., N, C) -> (..., N, C).

    Queries, keys and values come from one dense layer `qkv` whose outputs are ordered (q k v, head, channel).

    Fields:
      num_heads: heads; C must divide by it.
      qkv_bias: biases of queries, keys and values.
      key_bias: False leaves the keys without bias and holds the others as two vectors, `q_bias` and `v_bias` (BEiT).
      kernel_init: of `qkv`, and of the output projection `proj` where `out_init` is None.
    """

    num_heads: int
    qkv_bias: bool = True
    key_bias: bool = True
    kernel_init: Callable = nn.initializers.normal(0.02)
    out_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """`bias` is added to the scores of `attend`.

        Raises:
          ValueError: the channels do not divide into heads.
        """
        channels = x.shape[-1]
        if channels % self.num_heads:
            raise ValueError(f"{channels} channels do not divide into num_heads={self.num_heads}")
        dense_bias = self.qkv_bias and self.key_bias
        qkv = Dense(3 * channels, dense_bias, self.dtype, kernel_init=self.kernel_init, name="qkv")(x)
        if self.qkv_bias and not self.key_bias:
            vectors = [self.param(name, nn.initializers.zeros, (channels,)) for name in ("q_bias", "v_bias")]
            joined = jnp.concatenate([vectors[0], jnp.zeros_like(vectors[0]), vectors[1]]).astype(qkv.dtype)
            qkv = qkv + joined.reshape(*[1] * (qkv.ndim - 1), -1)
        heads = qkv.reshape(*x.shape[:-1], 3, self.num_heads, -1)  # (..., N, 3, heads, D)
        q, k, v = jnp.moveaxis(heads, (-3, -2), (0, -3))  # each (..., heads, N, D)
        y = attend(q, k, v, bias).swapaxes(-2, -3).reshape(x.shape)
        return Dense(channels, dtype=self.dtype, kernel_init=self.out_init or self.kernel_init, name="proj")(y)
