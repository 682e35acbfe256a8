"""GPTQ: weights are rounded one input after another, and those not yet rounded make up for the error.

    statistics = second_moment(K)
    for x in batches:                                     # what the layer is given, (..., K)
        statistics = add(statistics, x)
    found = gptq(kernel, statistics, Form(4, group=128), act_order=True)     # found.weight

With U upper triangular and U^T U the inverse of the Hessian H, input i leaves the error e = (w_i - q_i) / U_ii, and
every later w_j loses U_ij e.

Sources: Frantar et al. 2022, GPTQ (arXiv 2210.17323, algorithm 1) and `gptq.py` of IST-DASLab/gptq (commit 2d65066e);
groups of inputs in any order as in AutoGPTQ's `gptq.py`. Two things are as in the code and not as in the paper: the
grid of a group is fitted to weights as they are when the block in which the group starts begins, without the errors of
the inputs before it in that block; and the grid of a whole channel covers weights of dead inputs too.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype
from research.quantize import grids
from research.quantize.grids import Form, Grid
from research.quantize.quantized import Quantized, check, dequantize


class Moment(NamedTuple):
    """Second moment of a layer's inputs: the Hessian 2 / samples * sum of x x^T, (K, K), and how many samples."""

    hessian: jax.Array
    samples: jax.Array


class Solved(NamedTuple):
    """What GPTQ makes of a kernel.

    Fields:
      weight: its few bits; error: their `output_error`.
      rounded: (K, N), the weights that were rounded: the kernel with what made up for errors before each input's turn.
    """

    weight: Quantized
    error: jax.Array
    rounded: jax.Array


def second_moment(inputs: int, dtype=jnp.float32) -> Moment:
    """That of no data at all, for a layer of K inputs."""
    return Moment(jnp.zeros((inputs, inputs), dtype), jnp.zeros((), jnp.int32))


def add(moment: Moment, x: jax.Array) -> Moment:
    """The moment with a batch more, in the moment's dtype; pure, so that it runs within the jitted model.

    Args:
      x: (sequences, ..., K), or (positions, K), which counts as one sequence. The official code counts samples so too.
    """
    hessian, rows = moment.hessian, x.reshape(-1, x.shape[-1]).astype(moment.hessian.dtype)
    samples = moment.samples + (x.shape[0] if x.ndim > 2 else 1)
    wide = samples.astype(hessian.dtype)
    kept = moment.samples.astype(hessian.dtype) / wide
    rows = rows * jnp.sqrt(2 / wide)  # before the product, which stays small
    return Moment(hessian * kept + jnp.matmul(rows.T, rows, precision="highest"), samples)


def output_error(hessian: jax.Array, difference: jax.Array) -> jax.Array:
    """trace(d^T H d) for a difference d (K, N) of kernels: twice the squared error of outputs, a mean over samples."""
    difference = difference.astype(hessian.dtype)
    return jnp.sum(difference * jnp.matmul(hessian, difference, precision="highest"))


def gptq(
    w: jax.Array,
    moment: Moment,
    form: Form,
    *,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
) -> Solved:
    """A kernel (K, N) in few bits. Inputs that were always 0 get weights of 0.

    Compiled once for each shape and setting; outputs may be sharded. Not to be called under `jit`: it looks at results.

    Args:
      form: along axis 0. Grids are the official ones by the rules "gptq...", any other rule does as well. The official
        code has a shorter last group where `group` does not divide K; that is `pad`.
      damping: what is added to the Hessian's diagonal, as a share of its mean.
      block: inputs after which later ones are told of the errors; it speeds up and, but for grids of groups that start
        within a block, changes nothing but rounding.
      act_order: takes inputs by descending mean square. Groups are then of inputs that are no neighbours, and the
        result has an `order`, unless there are no groups or they are static.
      static_groups: grids of groups of neighbours are fitted before anything is rounded. Without groups, no matter.
    Raises:
      ValueError: shapes that do not fit, no samples, activations that are not finite, or a damping too small for
        the Hessian to be positive definite.
    """
    if w.ndim != 2 or form.axis % w.ndim != 0 or moment.hessian.shape != (len(w), len(w)):
        raise ValueError(
            f"GPTQ takes a kernel (K, N), a form along axis 0 and a Hessian (K, K), not {w.shape}, {form.axis} and "
            f"{moment.hessian.shape}"
        )
    if block < 1:
        raise ValueError(f"block: {block} is no number of inputs")
    if moment.samples == 0:
        raise ValueError("GPTQ has no calibration data: add() batches to the moment first")
    dtype = jnp.promote_types(accumulation_dtype(w), moment.hessian.dtype)
    w, hessian = w.astype(dtype), moment.hessian.astype(dtype)
    if not jnp.all(jnp.isfinite(hessian)):
        raise ValueError("GPTQ's Hessian is not finite: calibration gave the layer NaN or infinite activations")
    damp = jnp.asarray(damping, dtype)
    q, error, rounded, solved = _solve(w, hessian, damp, form, min(block, len(w)), act_order, static_groups)
    if not solved:
        raise ValueError(f"GPTQ's Hessian is not positive definite with damping={damping:g}: raise it")
    return Solved(check(q), error, rounded)


@functools.partial(jax.jit, static_argnames=("form", "block", "act_order", "static_groups"))
def _solve(w, hessian, damping, form, block, act_order, static_groups):
    """(q, its output error, what was rounded to it, whether the Hessian was positive definite)."""
    k, grouped = len(w), form.group is not None
    group, refit = min(form.group or k, k), grouped and not static_groups
    diagonal = jnp.diagonal(hessian)
    dead = diagonal == 0
    alive = jnp.where(dead[:, None], 0, w)
    grid = grids.fit(alive if grouped else w, form)
    diagonal = jnp.where(dead, 1, diagonal)
    order = jnp.argsort(-diagonal) if act_order else jnp.arange(k)
    damped = jnp.fill_diagonal(hessian, diagonal + damping * jnp.mean(diagonal), inplace=False)
    factor = _inverse_factor(damped[order][:, order])
    places = order // group if static_groups else jnp.arange(k) // group
    of_one = dataclasses.replace(form, group=None)
    codes, rounded, grid = _round(alive[order], factor, grid, places, of_one, group, block, refit)
    moved, back = act_order and refit, jnp.argsort(order)
    rounded = rounded[back]
    if not moved:
        codes = codes[back]
    codes = jnp.pad(codes, ((0, -k % group), (0, 0)))
    q = Quantized(codes, *grid, order.astype(jnp.int32) if moved else None, form.bits, 0, group, k)
    solved = jnp.all(jnp.isfinite(jnp.diagonal(factor)))
    return q, output_error(hessian, dequantize(q) - w), rounded, solved


def _inverse_factor(matrix: jax.Array) -> jax.Array:
    """U, upper triangular with U^T U the inverse of a matrix; NaN if it is not positive definite.

    The official code inverts the matrix and factorises the inverse. The same U is the inverse of the upper triangular R
    with R R^T the matrix, which is the factor of the matrix read backwards: half the work, and less is lost in float32.
    """
    upper = jnp.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(len(matrix), dtype=matrix.dtype))


def _round(w, factor, grid, places, form, group, block, refit):
    """Codes (K, N), the weights that were rounded to them, and their grid, fitted anew for each group if `refit`.

    Args:
      places: (K,), the group of each input.
      form: of one group.
    """
    (k, n), groups = w.shape, len(grid.scales)
    starting = -(-block // group) if refit else 0  # groups that start within a block, at most
    blocks = -(-k // block)
    rows = max(blocks * block, (groups + starting) * group if refit else 0)
    w = jnp.pad(w, ((0, rows - k), (0, 0)))
    factor = jnp.eye(blocks * block, rows, dtype=w.dtype).at[:k, :k].set(factor)
    places = jnp.pad(places, (0, rows - k), mode="edge")
    grid = jax.tree.map(lambda a: jnp.pad(a, ((0, starting), (0, 0))), grid)
    dtype = jnp.int8 if grid.zeros is None else jnp.uint8

    def of_block(carry, start):
        w, grid = carry
        if refit:  # one of these may start later; it is fitted again before anything is rounded to it
            first = (start + group - 1) // group
            current = jax.lax.dynamic_slice_in_dim(w, first * group, starting * group)
            fitted = grids.fit(current, dataclasses.replace(form, group=group))
            insert = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=first, axis=0)
            grid = jax.tree.map(insert, grid, fitted)
        ahead = jax.lax.dynamic_slice_in_dim(factor, start, block)
        own = jax.lax.dynamic_slice_in_dim(ahead, start, block, axis=1)

        def of_input(waiting, at):
            share = jax.tree.map(lambda a: a[places[start + at]], grid)
            codes = grids.nearest(waiting[at], share, form.bits)
            error = (waiting[at] - grids.values(codes, share)) / own[at, at]
            return waiting - own[at][:, None] * error[None], (codes.astype(dtype), error, waiting[at])

        waiting = jax.lax.dynamic_slice_in_dim(w, start, block)
        _, (codes, errors, rounded) = jax.lax.scan(of_input, waiting, jnp.arange(block))
        return (w - jnp.matmul(ahead.T, errors, precision="highest"), grid), (codes, rounded)

    (_, grid), found = jax.lax.scan(of_block, (w, grid), jnp.arange(blocks) * block)
    codes, rounded = (array.reshape(-1, n)[:k] for array in found)
    return codes, rounded, Grid(*jax.tree.map(lambda a: a[:groups], tuple(grid)))
