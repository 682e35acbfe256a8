"""The meaning of `lowbit_matmul`, in jnp.

Weights are s (q - z), q codes, s and z scales and zero points of groups of inputs. What is summed over the inputs k of
a group g, with s_g and z_g in front of the sum, is all that a kernel has to do:

    weights only:        out = sum_g s_g (sum_k x_k q_k - z_g sum_k x_k)
    both quantised:      out = s_x sum_g s_g (sum_k x_k q_k - z_g sum_k x_k), x integer codes, sums in int32
    zeros of both:       x_k - z_x in the place of x_k
    1 bit each:          out = alpha (K - 2 ones(x XOR w))

Float sums are taken in float32, or float64 for float64 inputs. int32 sums of 8-bit codes hold for groups of up to
133,000 inputs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.kernels.binary_matmul import reference as binary
from research.kernels.lowbit_matmul.layout import Packed, codes_of
from research.layers.norm import accumulation_dtype

SMALLEST = 1e-5  # of a largest magnitude or a range, in the official codes


class Tokens(NamedTuple):
    """Quantised activations, s (q - z): codes (M, K) int8, scales (M, 1), and zero points (M, 1) int32 or None."""

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None = None


def divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """x / by, correctly rounded.

    XLA multiplies by the reciprocal of a divisor that it broadcasts. That moves quotients off the exact halves on which
    the ends of symmetric grids lie, and so codes.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(jnp.asarray(by, x.dtype), x.shape))


def absmax(x: jax.Array, bits: int, axis: int | tuple[int, ...]) -> jax.Array:
    """Scales of signed codes up to 2^(bits-1) - 1 by the largest magnitude over some axes, which are kept as ones."""
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
    return divide(jnp.maximum(largest, SMALLEST), 2 ** (bits - 1) - 1)


def quantize_tokens(x: jax.Array, bits: int) -> Tokens:
    """Each row of (M, K) by its largest magnitude: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1, halves to even."""
    x = x.astype(accumulation_dtype(x))
    largest, scales = 2 ** (bits - 1) - 1, absmax(x, bits, 1)
    codes = jnp.clip(jnp.round(divide(x, scales)), -largest, largest)
    return Tokens(codes.astype(jnp.int8), scales)


def spread(scales: jax.Array, group: int, length: int) -> jax.Array:
    """Scales of groups as scales of inputs: (G, N) -> (length, N); (1, ...) stays."""
    return scales if scales.shape[0] == 1 else jnp.repeat(scales, group, axis=0)[:length]


def dequantize(weight: Packed, dtype=jnp.float32) -> jax.Array:
    """The weight (K, N), its rows in the order of the codes."""
    of_rows = lambda array: spread(array.astype(dtype), weight.group, weight.length)
    codes = codes_of(weight).astype(dtype)
    return (codes if weight.zeros is None else codes - of_rows(weight.zeros)) * of_rows(weight.scales)


def in_order(x: jax.Array, weight: Packed) -> jax.Array:
    """Inputs (M, K) in the order of the weight's rows."""
    return x if weight.order is None else jnp.take(x, weight.order, axis=1)


def grouped(x: jax.Array, weight: Packed, axis: int) -> jax.Array:
    """Splits the axis of K inputs into (G, group), filled up with zeros."""
    groups = -(-weight.length // weight.group)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, groups * weight.group - weight.length)
    shape = (*x.shape[:axis], groups, weight.group, *x.shape[axis + 1 :])
    return jnp.pad(x, pads).reshape(shape)


def group_sums(x: jax.Array, weight: Packed) -> jax.Array:
    """Sums of inputs (M, K) over the weight's groups, (M, G): what zero points are multiplied with."""
    return jnp.sum(grouped(x, weight, 1), axis=2, dtype=x.dtype)


def weight_only(x: jax.Array, weight: Packed) -> jax.Array:
    """(M, K) by a weight (K, N) -> (M, N), float32 or better."""
    dtype = accumulation_dtype(x)
    return in_order(x, weight).astype(dtype) @ dequantize(weight, dtype)


def accumulators(codes: jax.Array, weight: Packed) -> jax.Array:
    """Exact products of integer codes (M, K) with those of the weight, without zero points: (G, M, N) int32."""
    left = grouped(codes.astype(jnp.int32), weight, 1)
    right = grouped(codes_of(weight), weight, 0)
    return jnp.einsum("mgk,gkn->gmn", left, right)


def integers(tokens: Tokens, weight: Packed) -> jax.Array:
    """Quantised activations by a quantised weight -> (M, N), in the dtype of the activations' scales.

    Rows of the codes are in the order of the weight's. Zero points of activations cost a product with the sums of the
    weight's columns, those of weights one with the sums of the tokens.
    """
    dtype = tokens.scales.dtype
    sums = accumulators(tokens.codes, weight).astype(dtype)
    token_sums = group_sums(tokens.codes.astype(jnp.int32), weight).T[:, :, None]  # (G, M, 1)
    if tokens.zeros is not None:
        columns = jnp.sum(grouped(codes_of(weight), weight, 0), axis=1, dtype=jnp.int32)  # (G, N)
        sums = sums - (tokens.zeros[None] * columns[:, None]).astype(dtype)
        rows = grouped(jnp.ones((1, weight.length), jnp.int32), weight, 1)  # filled-up inputs have no zero point
        token_sums = token_sums - tokens.zeros[None] * jnp.sum(rows, axis=2, dtype=jnp.int32).T[:, :, None]
    if weight.zeros is not None:
        sums = sums - token_sums.astype(dtype) * weight.zeros.astype(dtype)[:, None]
    return tokens.scales * jnp.sum(sums * weight.scales.astype(dtype)[:, None], axis=0)


def xnor(x: jax.Array, weight: jax.Array, k: int, alpha: jax.Array) -> jax.Array:
    """Signs (M, words) by signs (N, words) of k values, see `research.kernels.binary_matmul`, times alpha (N,)."""
    return binary.binary_matmul(x, weight, k, None).astype(alpha.dtype) * alpha[None]
