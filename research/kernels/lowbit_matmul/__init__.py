"""Matrix product with weights of 1 to 8 bits, which stay packed in memory.

    weight = quantized.pack(quantized.quantize(kernel, form))              # kernel (K, N), of research.quantize
    y = lowbit_matmul(x, weight, bias)                                     # W4A16 and the like
    y = lowbit_matmul(x, weight, bias, activation_bits=8)                  # W8A8, W4A8; 4 for W4A4

Scales, zero points and bias are part of the op. Where activations have bits, each token is quantised by its largest
magnitude and products are exact integers. The gradient is that of the activations alone, as if they had not been
quantised (straight-through): the weight is a constant. `xnor_matmul` takes one bit of both.

On all platforms this is `reference.py`, compiled by XLA; `layout.py` says how the weights lie.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from research.kernels.binary_matmul import words
from research.kernels.lowbit_matmul import reference
from research.kernels.lowbit_matmul.layout import PLANES, Packed, pack_codes, unpack_codes
from research.layers.norm import accumulation_dtype

__all__ = ["PLANES", "Packed", "lowbit_matmul", "pack_codes", "unpack_codes", "xnor_matmul"]

ACTIVATION_BITS = tuple(range(2, 9))


def lowbit_matmul(
    x: jax.Array, weight: Packed, bias: jax.Array | None = None, *, activation_bits: int | None = None
) -> jax.Array:
    """(..., K) by a packed weight (K, N), plus a bias (N,) -> (..., N) in the dtype of x.

    Args:
      activation_bits: 2 to 8 quantises x by token; None leaves it.
    Raises:
      ValueError: shapes that do not fit, or other bits.
    """
    k, n = weight.shape
    if x.shape[-1:] != (k,) or (bias is not None and bias.shape != (n,)):
        shape = None if bias is None else bias.shape
        raise ValueError(f"shapes do not fit: x {x.shape}, weight {(k, n)}, bias {shape}")
    if activation_bits is not None and activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits: {activation_bits} is not from 2 to 8, nor None for real activations")
    product = _product(activation_bits, x.reshape(-1, k), weight)
    product = product if bias is None else product + bias.astype(product.dtype)[None]
    return product.astype(x.dtype).reshape(*x.shape[:-1], n)


def xnor_matmul(x: jax.Array, weight: jax.Array, alpha: jax.Array) -> jax.Array:
    """Signs of (..., K) by packed signs (N, words of K), times alpha (N,) -> (..., N) in the dtype of alpha.

    No gradient. Source: Rastegari et al. 2016, "XNOR-Net" (arXiv 1603.05279), without the scales of inputs.

    Raises:
      ValueError: shapes that do not fit.
    """
    k = x.shape[-1]
    if weight.dtype != jnp.uint32 or weight.shape != (alpha.size, words(k)):
        raise ValueError(
            f"weight: {weight.dtype} {weight.shape} is not uint32 {(alpha.size, words(k))}: use pack_signs"
        )
    signs = reference.binary.pack_signs(x.reshape(-1, k))
    return reference.xnor(signs, weight, k, alpha).reshape(*x.shape[:-1], alpha.size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(bits: int | None, x: jax.Array, weight: Packed) -> jax.Array:
    if bits is None:
        return reference.weight_only(x, weight)
    return reference.integers(reference.quantize_tokens(reference.in_order(x, weight), bits), weight)


def _forward(bits, x, weight):
    # The dtype of x is kept as that of an empty array: residuals are arrays.
    return _product(bits, x, weight), (jnp.zeros((0,), x.dtype), weight)


def _backward(bits, kept, cotangent):
    empty, weight = kept
    gradient = cotangent @ reference.dequantize(weight, accumulation_dtype(cotangent)).T
    if weight.order is not None:
        gradient = jnp.zeros_like(gradient).at[:, weight.order].set(gradient)
    return gradient.astype(empty.dtype), jax.tree.map(_no_gradient, weight)


def _no_gradient(leaf: jax.Array):
    real = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if real else np.zeros(leaf.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)
