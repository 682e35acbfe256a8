"""Binary layers: one-bit and ternary activations, one-bit weights with scales, and their straight-through gradients.

Quantisers are written as the official BiMLP has them (Xu et al. 2022, arXiv 2212.14158; `src/quan_conv.py` in
mindspore-ai/models, commit eab643f5). All of them have the derivative of a surrogate, in forward and reverse mode, so
that one layer serves training (straight-through, on latent real weights) and inference. A kernel may be replaced by its
quantised values: the layer computes the same from them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.core.cost import binary_scope
from research.layers.dense import dot_general
from research.layers.norm import accumulation_dtype


def straight_through(value: Callable, slope: Callable) -> Callable:
    """The elementwise function `value(x)` with the derivative `slope(x)` in the place of its own."""
    function = jax.custom_jvp(value)
    function.defjvp(lambda primals, tangents: (function(*primals), slope(*primals) * tangents[0]))
    return function


def _inside(x: jax.Array) -> jax.Array:
    """1 where x lies in [-1, 1], 0 elsewhere: the derivative of the clip that comes before a rounding."""
    return (jnp.abs(x) <= 1).astype(x.dtype)


def _signs(x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))


def _tent(x: jax.Array) -> jax.Array:
    """2 - 2|x| inside [-1, 1], 0 elsewhere."""
    return jnp.maximum(2 - 2 * jnp.abs(x), jnp.zeros_like(x))


sign = straight_through(_signs, _inside)
"""+1 or -1, and +1 for 0, which has no third value in one bit (the official `binary_a` gives 0); derivative of clip."""

ternary = straight_through(lambda x: jnp.round(jnp.clip(x, -1, 1)), _inside)
"""-1, 0 or +1, halves to 0: the official `dorefa_a` at one bit, which is what BiMLP's layers use; derivative of clip.

The official rounding has no derivative of its own; this is the usual one.
"""

bireal = straight_through(_signs, _tent)
"""`sign` with the derivative of a piecewise quadratic: Bi-Real Net (Liu et al. 2018, arXiv 1808.00278, equation 6)."""

ACTIVATIONS: dict[str, Callable] = {
    "ternary": ternary,
    "sign": sign,
    "bireal": bireal,
    "relu": nn.relu,  # what the official layer does at 32 bits
    "real": lambda x: x,
}
QUANTISED = ("ternary", "sign", "bireal")


@jax.custom_jvp
def xnor(kernel: jax.Array) -> jax.Array:
    """`sign(kernel) * mean |kernel|` of the inputs of each output and tap, (kh, kw, inputs, outputs) -> the same.

    With one input to a group, as in a depthwise kernel, that is the kernel itself. The official `XnorM`: zeros stay
    zero, and the derivative is the identity, scale included.
    """
    signs, scales = signs_and_scales(kernel)
    return signs.astype(kernel.dtype) * scales


xnor.defjvp(lambda primals, tangents: (xnor(*primals), tangents[0]))

WEIGHTS: dict[str, Callable] = {"xnor": xnor, "real": lambda kernel: kernel}


def signs_and_scales(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `xnor` multiplies: signs (kh, kw, inputs, outputs) int8, scales (kh, kw, 1, outputs)."""
    return jnp.sign(kernel).astype(jnp.int8), jnp.mean(jnp.abs(kernel), axis=-2, keepdims=True)


class BinaryConv(nn.Module):
    """Convolution at stride 1 of quantised inputs with quantised weights, no bias: (B, H, W, C) -> (B, H, W, features).

    Fields:
      kernel_size: odd (height, width). The quantised map is padded with zeros, no binary value, to keep its size.
      groups: number of groups of channels.
      activation: a key of `ACTIVATIONS`; weights: of `WEIGHTS`.
    Raises:
      ValueError: an unknown quantiser.
    """

    features: int
    kernel_size: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "ternary"
    weights: str = "xnor"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        quantise = _choose("activation", ACTIVATIONS, self.activation)
        shape = (*self.kernel_size, x.shape[-1] // self.groups, self.features)
        # PyTorch's and MindSpore's initialiser of a convolution.
        kernel = self.param("kernel", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), shape)
        kernel = _choose("weights", WEIGHTS, self.weights)(kernel).astype(self.dtype)
        x = quantise(x.astype(self.dtype))
        with binary_scope(self.activation in QUANTISED and self.weights == "xnor"):
            if self.kernel_size == (1, 1) and self.groups == 1:
                return dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
            if self.groups == self.features:
                return jax.lax.platform_dependent(x, kernel, cpu=_sum_of_taps, default=_convolution)
            return _convolution(x, kernel)


def _convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Zero-padded to the size of `x`; the number of groups follows from the shapes."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        [(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )


def _sum_of_taps(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_convolution` for one output a group, as a sum of shifted maps.

    On CPU XLA takes 20 times as long for such a convolution, and for the gradient of a kernel with two inputs a group
    2 s, where this takes 20 ms for both gradients (128 maps of 8 x 8 x 64).
    """
    height, width, inputs, _ = kernel.shape
    wide, (rows, columns) = accumulation_dtype(x), x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (height // 2,) * 2, (width // 2,) * 2, (0, 0))).astype(wide)
    total = jnp.zeros((*x.shape[:3], kernel.shape[-1]), wide)
    for i, j, k in np.ndindex(height, width, inputs):
        # Group g reads inputs g * inputs ...: its k-th is every inputs-th channel from k on.
        tap = padded[:, i : i + rows, j : j + columns, k::inputs]
        total = total + tap * kernel[i, j, k].astype(wide)[None, None, None]
    return total.astype(x.dtype)


def _choose(field: str, table: dict[str, Callable], name: str) -> Callable:
    if name not in table:
        raise ValueError(f"{field}: {name!r} is none of {', '.join(table)}")
    return table[name]


class RPReLU(nn.Module):
    """PReLU between two learned shifts, all per channel: (..., C) -> (..., C).

    Source: ReActNet, Liu et al. 2020 (arXiv 2003.03488, equation 8); slope 0.25 and shifts 0 at first.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        slope = self.param("w", nn.initializers.constant(0.25), shape)
        before, after = (self.param(name, nn.initializers.zeros, shape) for name in ("move1", "move2"))
        x = x.astype(accumulation_dtype(x))
        before, slope, after = (_spread(vector, x) for vector in (before, slope, after))
        x = x + before
        return (jnp.maximum(x, 0) + slope * jnp.minimum(x, 0) + after).astype(self.dtype)


def shifted(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """(..., C) plus a learned vector (C,), parameter `name` of `module`, 0 at first."""
    return x + _spread(module.param(name, nn.initializers.zeros, (x.shape[-1],)), x)


def _spread(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.astype(x.dtype).reshape(*[1] * (x.ndim - 1), -1)
