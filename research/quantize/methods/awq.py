"""AWQ on a model: channels that matter are scaled up before rounding, by a search, then kernels are clipped by another.

A channel's scale is its mean magnitude to the power of a ratio; among the ratios 0, 1/20, ... 19/20 the one is taken
with which the module that reads the channels errs least: attention, the gated MLP, or a single layer. Then each group
of each output, but not those of queries and keys, is cut at the share 1, 0.95, ... 0.55 of its largest magnitude with
which its own product errs least.

Source: Lin et al. 2024 (arXiv 2306.00978) and the official `auto_scale.py`, `auto_clip.py` and `pre_quant.py` (commit
d6e797a4): all statistics are of the unquantised model, all scales are searched before any is applied. The official
grid is the rule "awq". Two things are more general: values go into the output's search wherever they fit, and where
inputs are rounded they are so in both searches.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from research.language.causal import Shared
from research.layers.norm import accumulation_dtype
from research.quantize import grids, window
from research.quantize.calibration import UNTOUCHED, Outcome, Problem, batches
from research.quantize.fake import fake_quantize
from research.quantize.grids import Form
from research.quantize.methods.nearest import rounded
from research.quantize.methods.passes import observed
from research.quantize.sequence import Blocks, Fold, Schemes, folded, kernel, tapped

SHRINK, SHRINKS = 0.05, 10
UNCLIPPED = ("q_proj", "k_proj")  # their product is too sensitive


@dataclasses.dataclass(frozen=True)
class Awq:
    """AWQ.

    Fields:
      grid: ratios tried; 1 scales nothing but what all channels share.
      clip: whether kernels are clipped; tokens: of the calibration data that decide about it, evenly taken.
    """

    grid: int = 20
    clip: bool = True
    tokens: int = 512
    window: ClassVar[int] = 1
    overlap: ClassVar[int] = 0

    def __call__(self, problem: Problem) -> list[Outcome]:
        (weights,), (schemes,) = problem.weights, problem.schemes
        for fold, factors in self.scales(problem).items():
            weights = folded(weights, fold, factors)
        if self.clip:
            weights = weights | self._clipped(problem, weights)
        return [Outcome(rounded(weights, schemes), {})]

    def scales(self, problem: Problem) -> dict[Fold, jax.Array]:
        """By what the channels of each fold are to be divided, (K,)."""
        (weights,), (schemes,), exact = problem.weights, problem.schemes, problem.exact
        folds = problem.blocks.folds(weights)
        folds = tuple(fold for fold in folds if any(kernel(layer) in schemes for layer in fold.readers))
        paths = [kernel(fold.readers[0]) for fold in folds]
        state = {path: jnp.zeros(len(weights[path]), exact.dtype) for path in paths}
        sums = observed(problem, weights, exact, _sums, state)
        means = {path: total / (exact.shape[0] * exact.shape[1]) for path, total in sums.items()}
        static, errors = {"folds": folds, "schemes": schemes, "grid": self.grid}, None
        for rows in batches(len(exact), problem.batch):
            more = module_errors(problem.blocks, weights, exact[rows], problem.shared, means, **static)
            errors = more if errors is None else jax.tree.map(jnp.add, errors, more)
        best = {fold: jnp.argmin(errors[fold.maker]) / self.grid for fold in folds}
        return {fold: _factors(means[kernel(fold.readers[0])], best[fold]) for fold in folds}

    def _clipped(self, problem: Problem, weights: Mapping) -> dict:
        (schemes,), count = problem.schemes, problem.exact.shape[0] * problem.exact.shape[1]
        few = {path: scheme for path, scheme in schemes.items() if path.split("/")[-2] not in UNCLIPPED}
        zeros = {path: _no_moment(weights[path], scheme.form) for path, scheme in few.items()}
        state = jnp.int32(0), jnp.int32(max(count // self.tokens, 1)), zeros
        _, _, moments = observed(problem, weights, problem.exact, _add_moments, state, schemes)
        return {path: clipped(weights[path], moments[path], form=few[path].form) for path in few}


@functools.partial(jax.jit, static_argnames=("blocks", "folds", "schemes", "grid"))
def module_errors(
    blocks: Blocks,
    weights: Mapping,
    x: jax.Array,
    shared: Shared,
    means: Mapping,
    *,
    folds,
    schemes: Schemes,
    grid: int,
) -> dict[str, jax.Array]:
    """Summed squared errors (grid,) of the modules that read the folds' channels, at each ratio, by maker.

    Args:
      weights: of one block; x: (B, N, C) enters it; means: magnitudes of channels by the path of the first reader.
    """
    seen: dict[str, jax.Array] = {}
    blocks.block(shared)(weights, x, tapped(window.rounded(UNTOUCHED, {}), seen))
    enter, found = window.rounded(schemes, {}), {}
    for fold in folds:
        paths = tuple(kernel(layer) for layer in fold.readers)
        module = functools.partial(_module, blocks, shared, paths)
        exact = module(weights, {path: seen[path] for path in paths})

        def error(ratio, paths=paths, module=module, exact=exact):
            factors = _factors(means[paths[0]], ratio)
            scaled = {path: weights[path] * factors[:, None] for path in paths}
            few = {path: fake_quantize(w, schemes[path].form) for path, w in scaled.items() if path in schemes}
            entering = {path: enter(path, seen[path] / factors[None, None]) for path in paths}
            return jnp.sum(jnp.square(module({**weights, **scaled, **few}, entering) - exact))

        found[fold.maker] = jax.lax.map(error, jnp.arange(grid, dtype=x.dtype) / grid)
    return found


def _module(blocks: Blocks, shared: Shared, readers: tuple[str, ...], weights: Mapping, entering: Mapping) -> jax.Array:
    """What the module that starts with `readers` gives, but for a bias, if `entering` enters them."""
    last = readers[0]
    if len(readers) > 1:  # the module ends with the next stage; what else the block computes is not used, nor compiled
        stages = blocks.plan.stages
        place = next(i for i, stage in enumerate(stages) if kernel(stage[0]) == readers[0])
        last, seen = kernel(stages[place + 1][0]), {}
        instead = lambda path, x: entering.get(path, x)
        blocks.block(shared)(weights, jnp.zeros_like(entering[readers[0]]), tapped(instead, seen))
        entering = seen
    return entering[last] @ weights[last]


@functools.partial(jax.jit, static_argnames="form")
def clipped(w: jax.Array, moment: jax.Array, form: Form) -> jax.Array:
    """A kernel (K, N) whose groups are cut where, then rounded, they give the least error.

    Args:
      moment: of the inputs in each group, sum of x x^T, (G, g, g).
    """
    parts = grids.blocks(w.astype(accumulation_dtype(w)), form)
    largest = jnp.max(jnp.abs(parts), axis=1, keepdims=True)

    def cut(share):
        return jnp.clip(parts, -largest * share, largest * share)

    def error(step):
        few = fake_quantize(grids.unite(cut(1 - SHRINK * step), w, form), form).astype(parts.dtype)
        off = grids.blocks(few, form) - parts
        return jnp.sum(off * jnp.matmul(moment, off, precision="highest"), axis=1, keepdims=True)

    best = jnp.argmin(jax.lax.map(error, jnp.arange(SHRINKS, dtype=parts.dtype)), axis=0)
    return grids.unite(cut(1 - SHRINK * best.astype(parts.dtype)), w, form)


def _factors(means: jax.Array, ratio: jax.Array) -> jax.Array:
    factors = jnp.maximum(means ** ratio.astype(means.dtype), 1e-4)
    return factors / jnp.sqrt(jnp.max(factors) * jnp.min(factors))


def _sums(state: dict, seen: dict) -> dict:
    """Summed magnitudes of each channel."""
    of = lambda x: jnp.sum(jnp.abs(x.reshape(-1, x.shape[-1])), axis=0)
    return {path: total + of(seen[path]) for path, total in state.items()}


def _no_moment(w: jax.Array, form: Form) -> jax.Array:
    groups, size, _ = jax.eval_shape(lambda: grids.blocks(w, form)).shape
    return jnp.zeros((groups, size, size), accumulation_dtype(w))


def _add_moments(state: tuple, seen: dict) -> tuple:
    """Adds every `step`-th token, counted over all texts, to the moments of groups."""
    taken, step, moments = state

    def added(moment, x):
        rows = x.reshape(-1, x.shape[-1]).astype(moment.dtype)
        rows = jnp.where(((taken + jnp.arange(len(rows))) % step == 0)[:, None], rows, 0)
        groups, size, _ = moment.shape
        rows = jnp.pad(rows, ((0, 0), (0, groups * size - rows.shape[1]))).reshape(-1, groups, size)
        return moment + jnp.einsum("tgk,tgl->gkl", rows, rows, precision="highest")

    first = next(iter(seen.values()))
    moments = {path: added(moment, seen[path]) for path, moment in moments.items()}
    return taken + first.shape[0] * first.shape[1], step, moments
