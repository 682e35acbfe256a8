"""Grids: which scales and zero points an array gets before any rounding is learned.

A number x becomes the code q = clip(round(x / s) + z, 0, 2^b - 1) and is read back as s (q - z); rules without zero
points have signed codes, q = clip(round(x / s), -(2^(b-1) - 1), 2^(b-1) - 1). Halves are rounded to even. Rules are
those of the official codes, which differ in details that move codes:

    rule                 range                                scale             zero point
    absmax               largest magnitude, at least 1e-5     m / (2^(b-1)-1)   none (SmoothQuant)
    sign                 mean magnitude, 1 bit                mean              none (XNOR-Net): codes -1 and +1
    gptq                 minimum and maximum, 0 included      range / (2^b-1)   round(-min / s)
    gptq_symmetric       the same, widened to [-m, m]         range / (2^b-1)   2^(b-1)
    gptq_mse, gptq_symmetric_mse   the best of 80 shrunk ranges of those, by the sum of |error|^2.4
    awq                  minimum and maximum, at least 1e-5   range / (2^b-1)   -round(min / s), within the codes
    omniquant            minimum and maximum                  range / (2^b-1)   round(-min / s), anywhere
    omniquant_symmetric  largest magnitude                    m / (2^(b-1)-1)   2^(b-1) - 1

Sources: IST-DASLab/gptq `quant.py` (commit 2d65066e), mit-han-lab/llm-awq `quantizer.py` (d6e797a4),
OpenGVLab/OmniQuant `quantizer.py` (95fae1bd), mit-han-lab/smoothquant `fake_quant.py` (c61476d7).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.kernels.lowbit_matmul.layout import PLANES
from research.kernels.lowbit_matmul.reference import SMALLEST, absmax, divide
from research.layers.norm import accumulation_dtype

BITS = tuple(PLANES)
SHRINKS, NORM = 80, 2.4  # of GPTQ's search for the least error


class Grid(NamedTuple):
    """Scales, and zero points of their shape and dtype, or None for signed codes."""

    scales: jax.Array
    zeros: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Form:
    """What an array is quantised to.

    Fields:
      bits: from 1 to 8.
      axis: along which numbers that share a scale lie, the one a product sums over: 0 of a kernel (K, N) gives a scale
        for each output channel, -1 of activations (..., K) one for each token.
      group: how many of them share a scale; None for the whole axis.
      per_tensor: one scale for the whole array.
      rule: of the grid, see above.
      pad: fills up the last group, where `group` does not divide the axis.
    Raises:
      ValueError: bits or a rule that are not among those, a rule that has no such bits, a group that is none.
    """

    bits: int
    axis: int = 0
    group: int | None = None
    per_tensor: bool = False
    rule: str = "gptq"
    pad: bool = False

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits: {self.bits} is not from 1 to {max(BITS)}")
        if self.rule not in RULES:
            raise ValueError(f"rule: {self.rule!r} is none of {', '.join(RULES)}")
        if (self.rule == "sign") != (self.bits == 1) and self.rule in ("sign", "absmax", "omniquant_symmetric"):
            raise ValueError(f'rule: {self.rule!r} has no {self.bits} bits; "sign" is for 1, others for more')
        if self.group is not None and (self.group < 1 or self.per_tensor):
            raise ValueError(f"group: {self.group} is no number of inputs to a scale (per_tensor={self.per_tensor})")


def blocks(x: jax.Array, form: Form) -> jax.Array:
    """Splits `form.axis` of x (..., L, ...) into groups: (..., G, g, ...), filled up with zeros where the form says so.

    Raises:
      ValueError: a group that does not divide L, and no `pad`.
    """
    axis, length = form.axis % x.ndim, x.shape[form.axis]
    group = min(form.group or length, length)
    if length % group and not form.pad:
        raise ValueError(f"group: {form.group} does not divide the {length} entries of axis {axis}; pad=True fills up")
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -length % group)
    return jnp.pad(x, pads).reshape(*x.shape[:axis], -1, group, *x.shape[axis + 1 :])


def unite(parts: jax.Array, like: jax.Array, form: Form) -> jax.Array:
    """The inverse of `blocks` for an array of the shape and dtype of `like`."""
    axis = form.axis % like.ndim
    united = parts.reshape(*like.shape[:axis], -1, *like.shape[axis + 1 :])
    return jax.lax.slice_in_dim(united, 0, like.shape[axis], axis=axis).astype(like.dtype)


def fit(x: jax.Array, form: Form) -> Grid:
    """The grid of an array, in float32 or better.

    Scales have the rank of x: its shape with `form.axis` as long as there are groups, or all ones for `per_tensor`.
    What fills up the last group counts as zeros.
    """
    x = x.astype(accumulation_dtype(x))
    if form.per_tensor:
        return RULES[form.rule](x, form.bits, tuple(range(x.ndim)))
    over = form.axis % x.ndim + 1
    grid = RULES[form.rule](blocks(x, form), form.bits, (over,))
    return jax.tree.map(lambda array: jnp.squeeze(array, over), grid)


def nearest(x: jax.Array, grid: Grid, bits: int) -> jax.Array:
    """Codes of x by a grid that broadcasts against it, as floating numbers."""
    low, high = limits(bits, signed=grid.zeros is None)
    if grid.zeros is None and bits == 1:
        return jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))
    codes = jnp.round(divide(x, grid.scales))
    return jnp.clip(codes if grid.zeros is None else codes + grid.zeros, low, high)


def values(codes: jax.Array, grid: Grid) -> jax.Array:
    """What codes stand for, by a grid that broadcasts against them and has their dtype."""
    return grid.scales * (codes if grid.zeros is None else codes - grid.zeros)


def clip(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clips, with derivative 1 within the range and at its ends, 0 beyond, as PyTorch's."""
    low, high = (jnp.asarray(end, x.dtype) for end in (low, high))
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def limits(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    if not signed:
        return 0, 2**bits - 1
    largest = max(2 ** (bits - 1) - 1, 1)
    return -largest, largest


def _absmax(x, bits, over):
    return Grid(absmax(x, bits, over), None)


def _sign(x, bits, over):
    return Grid(jnp.mean(jnp.abs(x), axis=over, keepdims=True), None)


def _gptq(x, bits, over, symmetric=False, search=False):
    low = jnp.minimum(jnp.min(x, axis=over, keepdims=True), 0)
    high = jnp.maximum(jnp.max(x, axis=over, keepdims=True), 0)
    if symmetric:
        high = jnp.maximum(-low, high)
        low = jnp.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low, high = jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)

    def shrunk(to):
        scales = divide(to * high - to * low, 2**bits - 1)
        zeros = jnp.full_like(scales, 2 ** (bits - 1)) if symmetric else jnp.round(divide(-to * low, scales))
        return Grid(scales, zeros)

    if not search:
        return shrunk(jnp.ones((), x.dtype))

    def better(step, best):
        grid = shrunk(1 - divide(step.astype(x.dtype), 100))
        error = jnp.abs(values(nearest(x, grid, bits), grid) - x) ** NORM
        error = jnp.sum(error, axis=over, keepdims=True)
        return jax.tree.map(lambda new, old: jnp.where(error < best[0], new, old), (error, grid), best)

    start = jnp.full_like(low, jnp.inf), shrunk(jnp.ones((), x.dtype))
    return jax.lax.fori_loop(0, SHRINKS, better, start)[1]


def _awq(x, bits, over):
    low, high = (reduce(x, axis=over, keepdims=True) for reduce in (jnp.min, jnp.max))
    scales = divide(jnp.maximum(high - low, SMALLEST), 2**bits - 1)
    return Grid(scales, jnp.clip(-jnp.round(divide(low, scales)), 0, 2**bits - 1))


def end(x: jax.Array, over: tuple[int, ...], place: Callable[..., jax.Array]) -> jax.Array:
    """The entry at a place, such as `jnp.argmax`, over one or all axes, kept as ones.

    The gradient of `jnp.max` goes to entries that equal the largest. Where XLA computes an array twice, apart by
    rounding, there may be none, and it is NaN; that of an entry is not.
    """
    if len(over) == x.ndim:
        return x.reshape(-1)[place(x)].reshape([1] * x.ndim)
    (axis,) = over
    return jnp.take_along_axis(x, place(x, axis=axis, keepdims=True), axis=axis)


def omniquant(
    x: jax.Array, bits: int, over: tuple[int, ...], symmetric: bool = False, shrink: tuple | None = None
) -> Grid:
    """The grid over some axes, kept as ones; `shrink` are factors (of the maximum, of the minimum).

    Differentiable in x and the factors as the official code: zero points have no gradient.
    """
    low, high = (end(x, over, place) for place in (jnp.argmin, jnp.argmax))
    if shrink is not None:
        high, low = shrink[0] * high, shrink[1] * low
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        scales = clip(divide(jnp.maximum(jnp.abs(high), jnp.abs(low)), largest), SMALLEST, 1e4)
        return Grid(scales, jnp.full_like(scales, largest))
    scales = clip(divide(high - low, 2**bits - 1), SMALLEST, 1e4)
    return Grid(scales, jax.lax.stop_gradient(jnp.round(jnp.clip(divide(-low, scales), -1e4, 1e4))))


RULES: dict[str, Callable[..., Grid]] = {
    "absmax": _absmax,
    "sign": _sign,
    "gptq": _gptq,
    "gptq_symmetric": functools.partial(_gptq, symmetric=True),
    "gptq_mse": functools.partial(_gptq, search=True),
    "gptq_symmetric_mse": functools.partial(_gptq, symmetric=True, search=True),
    "awq": _awq,
    "omniquant": omniquant,
    "omniquant_symmetric": functools.partial(omniquant, symmetric=True),
}
