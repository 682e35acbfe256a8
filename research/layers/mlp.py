"""The two-layer perceptron of transformers and mixers, and its activations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.dense import Dense
from research.layers.norm import accumulation_dtype


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU `x Phi(x)`, in float32 or better, returned in the dtype of `x` (Hendrycks & Gimpel 2016).

    By erf, as PyTorch has it. `jax.nn.gelu(approximate=False)` goes by erfc for the relative accuracy of values that
    vanish beside their neighbours, at twice the cost on CPU.
    """
    wide = x.astype(accumulation_dtype(x))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """`x sigmoid(1.702 x)`, the approximation of GELU that OpenAI's CLIP was trained with."""
    wide = x.astype(accumulation_dtype(x))
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


class Mlp(nn.Module):
    """`fc2(act(fc1(x)))`: (..., C) -> (..., hidden) -> (..., C).

    Fields:
      hidden: width of the hidden layer.
      act: activation between the layers.
      kernel_init, bias_init: initialisers of both layers; `out_init` is that of the second kernel where it differs.
    """

    hidden: int
    act: Callable = gelu
    kernel_init: Callable = nn.initializers.normal(0.02)
    bias_init: Callable = nn.initializers.zeros
    out_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"bias_init": self.bias_init, "dtype": self.dtype}
        y = Dense(self.hidden, kernel_init=self.kernel_init, name="fc1", **options)(x)
        return Dense(x.shape[-1], kernel_init=self.out_init or self.kernel_init, name="fc2", **options)(self.act(y))
