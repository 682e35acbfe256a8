"""Fake quantisation: arrays rounded to few bits and read back, with gradients to train through it.

    y = fake_quantize(x, Form(bits=4, group=128))                  # straight-through
    y = learnable_clip(w, up, low, form)                           # OmniQuant's learnable weight clipping
    y = lsq(x, step, bits=4, signed=True)                          # LSQ: a learned step

Rounding has the derivative 1 everywhere. A clip has the derivative 1 within its range, ends included: codes lie on the
ends often, and JAX's own `clip` would count half of them.
"""

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype
from research.quantize import grids
from research.quantize.grids import Form, Grid, clip


def straight_through(rounded: jax.Array, x: jax.Array) -> jax.Array:
    """`rounded`, exactly, with the derivative of x."""
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))


def round_through(x: jax.Array) -> jax.Array:
    """Rounds, halves to even, with derivative 1."""
    return straight_through(jnp.round(x), x)


def floor_through(x: jax.Array) -> jax.Array:
    """Rounds down, with derivative 1."""
    return straight_through(jnp.floor(x), x)


def affine(x: jax.Array, grid: Grid, bits: int) -> jax.Array:
    """s (clip(round(x / s) + z) - z) by a grid that broadcasts against x; differentiable in x and the grid.

    The gradient of a scale is that of the official OmniQuant: (code - z) - x / s within the range, code - z beyond.
    """
    if grid.zeros is None and bits == 1:  # signs: no clip but that of their derivative, to [-s, s]
        inside = clip(grids.divide(x, grid.scales), -1, 1)
        return grid.scales * straight_through(grids.nearest(x, grid, bits), inside)
    codes = round_through(grids.divide(x, grid.scales))
    codes = clip(codes if grid.zeros is None else codes + grid.zeros, *grids.limits(bits, grid.zeros is None))
    return grids.values(codes, grid)


def fake_quantize(x: jax.Array, form: Form, grid: Grid | None = None) -> jax.Array:
    """An array rounded to `form` and read back, in the dtype of x; the gradient of x is straight-through.

    Args:
      grid: in the shapes of `grids.fit`, with gradients of its own; by default the array's, held constant.
    """
    grid = jax.lax.stop_gradient(grids.fit(x, form)) if grid is None else grid
    axis = form.axis % x.ndim
    parts = grids.blocks(x.astype(grid.scales.dtype), form)
    rounded = affine(parts, jax.tree.map(lambda array: jnp.expand_dims(array, axis + 1), grid), form.bits)
    return grids.unite(rounded, x, form)


def learnable_clip(w: jax.Array, up: jax.Array, low: jax.Array, form: Form) -> jax.Array:
    """OmniQuant's learnable weight clipping: sigmoid(up) and sigmoid(low) shrink the range of every group.

    Differentiable in all of w, up and low; 4 is the official start of the factors. Source: Shao et al. 2024, OmniQuant
    (arXiv 2308.13137, equation 2) and `quantize/quantizer.py`.

    Args:
      up, low: of the shape of the scales of `grids.fit(w, form)`, float32.
      form: its `rule` is "omniquant" or "omniquant_symmetric".
    Raises:
      ValueError: another rule.
    """
    if form.rule not in ("omniquant", "omniquant_symmetric"):
        raise ValueError(f'rule: {form.rule!r} has no learnable clipping; take "omniquant" or "omniquant_symmetric"')
    wide, axis = w.astype(accumulation_dtype(w)), form.axis % w.ndim
    if form.per_tensor:
        parts, over, factors = wide, tuple(range(w.ndim)), (up, low)
    else:
        parts, over = grids.blocks(wide, form), (axis + 1,)
        factors = tuple(jnp.expand_dims(factor, axis + 1) for factor in (up, low))
    shrink = tuple(jax.nn.sigmoid(factor) for factor in factors)
    grid = grids.omniquant(parts, form.bits, over, form.rule == "omniquant_symmetric", shrink)
    rounded = affine(parts, grid, form.bits)
    return rounded.astype(w.dtype) if form.per_tensor else grids.unite(rounded, w, form)


def lsq(x: jax.Array, step: jax.Array, bits: int, signed: bool, examples: int | None = None) -> jax.Array:
    """Rounds to multiples of a learned step: s round(clip(x / s)), codes from -2^(bits-1) or 0, in the dtype of x.

    Source: Esser et al. 2020, LSQ (arXiv 1902.08153): the gradient of the step is round(x / s) - x / s within the
    range and the end beyond it (equation 3), scaled by 1 / sqrt(entries times largest code) (section 2.2).

    Args:
      step: positive; broadcasts against x.
      examples: entries of x to a step, for the scale of the gradient; None does not scale it.
    """
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if examples is not None:
        scale = (examples * max(high, 1)) ** -0.5
        step = straight_through(step, step * scale)
    wide = x.astype(step.dtype)
    return (step * round_through(clip(grids.divide(wide, step), low, high))).astype(x.dtype)


def stepped(x: jax.Array, step: jax.Array, bits: int) -> jax.Array:
    """As `lsq`, but clipped after rounding: what rounds to the last code has the gradient of what lies inside."""
    codes = round_through(grids.divide(x.astype(step.dtype), step))
    return (step * clip(codes, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)).astype(x.dtype)
