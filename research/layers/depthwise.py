"""Depthwise convolutions as sums of shifted maps: with one kernel for all examples, or one an example.

On a CPU (2 cores, AVX-512) XLA's own depthwise convolution takes 7 to 40 times as long forwards and 4 to 20 times
backwards, as it treats every channel as a convolution by itself. A sum over the kernel's positions is one loop over the
map that reads its neighbours from the cache. With a kernel an example XLA's form is a convolution of B x C groups, and
the sum is the form everywhere (measured on CPUs alone).

The sums have a derivative rule of their own, which JAX applies in reverse mode alone (`grad`, `vjp`; not `jvp`).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """Every channel convolved with its own kernel: (B, H, W, C) -> (B, H', W', C) in the dtype of `x`.

    Args:
      kernel: (k, k, C), or (B, k, k, C) with a kernel an example.
      stride, padding: in both directions; zeros are padded on all sides.
    Returns:
      Sums taken in float32 or better where the sum of shifted maps is used.
    """
    call = functools.partial(_sum, stride, padding)
    plain = functools.partial(_convolution, stride, padding)
    if kernel.ndim == 3:
        return jax.lax.platform_dependent(x, kernel, cpu=call, default=plain)
    # The default is the meaning, and what `cost.macs` counts: it sees no products in a sum of maps.
    return jax.lax.platform_dependent(x, kernel, cpu=call, cuda=call, rocm=call, tpu=call, default=plain)


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    **options,
) -> jax.Array:
    """`depthwise_conv` with the signature of `lax.conv_general_dilated`: the `conv_general_dilated` of an `nn.Conv`.

    What it does not do is left to XLA: unequal sides, strides or paddings, and groups of several channels.
    """
    edges = set() if isinstance(padding, str) else {edge for pair in padding for edge in pair}
    side, square, inputs, features = kernel.shape
    depth = feature_group_count == x.shape[-1] == features and inputs == 1
    plain = all(options.get(name) in (None, (1, 1)) for name in ("lhs_dilation", "rhs_dilation"))
    if depth and plain and side == square and len(edges) == len(set(strides)) == 1:
        return depthwise_conv(x, kernel[:, :, 0], strides[0], edges.pop())
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, feature_group_count=feature_group_count, **options)


def per_example_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: int, groups: int = 1) -> jax.Array:
    """XLA's convolution with a kernel an example: x (B, H, W, I), kernel (B, k, k, I / groups, O)."""

    def one(x, kernel):
        return jax.lax.conv_general_dilated(
            x[None],
            kernel,
            (stride, stride),
            ((padding, padding),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )[0]

    return jax.vmap(one)(x, kernel)


def taps(x: jax.Array, side: int, stride: int, padding: int) -> list[jax.Array]:
    """The side x side shifted maps (B, H', W', C) that a convolution adds up, row by row of the kernel."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((size - side) // stride + 1 for size in x.shape[1:3])
    reach = lambda start, count: slice(start, start + (count - 1) * stride + 1, stride)
    return [x[:, reach(i, height), reach(j, width)] for i in range(side) for j in range(side)]


def _convolution(stride: int, padding: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    if kernel.ndim == 4:
        return per_example_conv(x, kernel[:, :, :, None], stride, padding, channels)
    numbers = ("NHWC", "HWIO", "NHWC")
    pads = ((padding, padding),) * 2
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (stride, stride), pads, dimension_numbers=numbers, feature_group_count=channels
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(stride: int, padding: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    dtype, side = accumulation_dtype(x), kernel.shape[-2]
    # (positions, 1 or B, 1, 1, C)
    weights = kernel.astype(dtype).reshape(-1, side * side, 1, 1, kernel.shape[-1]).swapaxes(0, 1)
    terms = (tap.astype(dtype) * weight for tap, weight in zip(taps(x, side, stride, padding), weights, strict=True))
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _forward(stride, padding, x, kernel):
    return _sum(stride, padding, x, kernel), (x, kernel)


def _backward(stride: int, padding: int, saved, gradient: jax.Array):
    """Both gradients gather: the map's is a sum over the flipped kernel, the kernel's one reduction an entry."""
    x, kernel = saved
    side, dtype = kernel.shape[-2], accumulation_dtype(x)
    edge = side - 1 - padding
    # Zeros between the entries undo the stride, and after them stand in for positions the stride never reached.
    sizes = [(size, (found - 1) * stride + 1) for size, found in zip(x.shape[1:3], gradient.shape[1:3], strict=True)]
    config = [(edge, size + side - 1 - spread - edge, stride - 1) for size, spread in sizes]
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), [(0, 0, 0), *config, (0, 0, 0)])
    for_x = _sum(1, 0, spread, jnp.flip(kernel, (-3, -2)))
    if kernel.ndim == 4:
        shifted = taps(x, side, stride, padding)
        sums = jnp.stack([jnp.sum(tap.astype(dtype) * gradient.astype(dtype), (1, 2)) for tap in shifted], 1)
        return for_x, sums.reshape(kernel.shape).astype(kernel.dtype)

    return for_x, _kernel_gradient(x, gradient, side, stride, padding).astype(kernel.dtype)


_sum.defvjp(_forward, _backward)


# XLA:CPU does not vectorise a loop over slices at a traced position; it cuts them out first where the loop reads them
# more than 15 times.
_LEAST_TERMS, _MOST_COLUMNS = 16, 28


def _kernel_gradient(x: jax.Array, gradient: jax.Array, side: int, stride: int, padding: int) -> jax.Array:
    """(side, side, C): the gradient of a kernel that all examples share, in float32 or better.

    A scan over blocks of the gradient's map, of which each adds its positions' products with their neighbourhoods to
    (B, side, side, C) sums. A reduction an entry of the kernel, the plain form, reads both maps side * side times and
    strides over the channels: 3 to 10 times as slow for 7x7 kernels.
    """
    dtype = accumulation_dtype(x)
    batch, height, width, channels = gradient.shape
    down, block_height, across, block_width = _blocks(height, width)
    rest = [(0, down * block_height - height), (0, across * block_width - width)]
    gradient = jnp.pad(gradient, ((0, 0), *rest, (0, 0)))  # zeros add nothing
    reach = [(steps * block - 1) * stride + side for steps, block in ((down, block_height), (across, block_width))]
    edges = [(padding, max(found - size - padding, 0)) for found, size in zip(reach, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    window = [(block - 1) * stride + side for block in (block_height, block_width)]

    def block(sums: jax.Array, index: jax.Array):
        row, column = index // across * block_height, index % across * block_width
        part = jax.lax.dynamic_slice(gradient, (0, row, column, 0), (batch, block_height, block_width, channels))
        around = jax.lax.dynamic_slice(x, (0, row * stride, column * stride, 0), (batch, *window, channels))
        for i in range(block_height):
            for j in range(block_width):
                near = around[:, i * stride : i * stride + side, j * stride : j * stride + side]
                sums = sums + near.astype(dtype) * part[:, i : i + 1, j : j + 1].astype(dtype)
        return sums, None

    sums, _ = jax.lax.scan(block, jnp.zeros((batch, side, side, channels), dtype), jnp.arange(down * across))
    return jnp.sum(sums, axis=0)


def _blocks(height: int, width: int) -> tuple[int, int, int, int]:
    """(blocks down, their height, blocks across, their width): equal, of about `_LEAST_TERMS` positions or more."""
    across = -(-width // _MOST_COLUMNS)
    block_width = -(-width // across)
    block_height = -(-height // max(1, height // -(-_LEAST_TERMS // block_width)))
    return -(-height // block_height), block_height, across, block_width
