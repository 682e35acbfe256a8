"""Learned rounding: every weight is rounded down, plus a learned number from 0 to 1 that ends as 0 or 1.

    codes = clip(floor(w / s) + h(v) + z, 0, 2^b - 1),    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)

AdaRound and BRECQ learn v for each weight; CBQ's LoRA-Rounding learns v = v0 + A1 A2 of low rank. With v0 = 0, the
paper's form, the signs of v have that rank too and cannot even say rounding to nearest; v0 = `start(w / s)` can.

Sources: Nagel et al. 2020, AdaRound (arXiv 2004.10568); Li et al. 2021, BRECQ (arXiv 2102.05426),
`quant/adaptive_rounding.py` and `quant/block_recon.py` (commit e455d62e); CBQ (arXiv 2312.07950).
"""

import jax
import jax.numpy as jnp

from research.quantize import fake, grids
from research.quantize.grids import Grid

ZETA, GAMMA = 1.1, -0.1


def share(v: jax.Array, zeta: float = ZETA, gamma: float = GAMMA) -> jax.Array:
    """h(v), the rectified sigmoid: what is added to a weight that was rounded down, from 0 to 1."""
    return grids.clip(jax.nn.sigmoid(v) * (zeta - gamma) + gamma, 0, 1)


def start(x: jax.Array, zeta: float = ZETA, gamma: float = GAMMA) -> jax.Array:
    """The v for which `share` gives what rounding x = w / s down cuts off."""
    rest = x - jnp.floor(x)
    return -jnp.log((zeta - gamma) / (rest - gamma) - 1)


def soft(w: jax.Array, grid: Grid, added: jax.Array, bits: int, through: bool = False) -> jax.Array:
    """Weights with `added`, from 0 to 1, in the place of rounding; the grid broadcasts and has zero points.

    Args:
      through: the floor passes the gradient, so that scales get LSQ's; BRECQ's does not.
    """
    down = (fake.floor_through if through else jnp.floor)(grids.divide(w, grid.scales))
    return grids.values(grids.clip(down + added + grid.zeros, *grids.limits(bits, signed=False)), grid)


def hard(w: jax.Array, grid: Grid, v: jax.Array, bits: int) -> jax.Array:
    """Weights rounded up where v >= 0, that is where `share` is a half or more."""
    return soft(w, grid, (v >= 0).astype(w.dtype), bits)


def undecided(added: jax.Array, beta: jax.Array | float) -> jax.Array:
    """The regulariser, summed over weights: 1 - |2 h - 1|^beta, 0 where h is 0 or 1."""
    return jnp.sum(1 - jnp.abs(2 * (added - 0.5)) ** beta)


def temperature(
    step: jax.Array | int, steps: int, warm_up: float = 0.2, start: float = 20.0, end: float = 2.0
) -> jax.Array:
    """The exponent of `undecided` at a step: `start` during the share `warm_up` of all steps, then linear to `end`.

    BRECQ counts steps from 1 and leaves the regulariser out while step < warm_up * steps; its weight is 0.01 after.
    """
    begin = warm_up * steps
    left = 1 - (jnp.asarray(step, float) - begin) / (steps - begin)
    return end + (start - end) * jnp.clip(left, 0, 1)
