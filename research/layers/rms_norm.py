"""Root-mean-square normalisation of LLaMA and T5."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.norm import accumulation_dtype


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis, in float32 or better (Zhang & Sennrich 2019)."""

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(accumulation_dtype(x))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(x.dtype).reshape(*[1] * (x.ndim - 1), -1)).astype(self.dtype)
