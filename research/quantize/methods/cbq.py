"""CBQ on a model: outliers are cut off and scaled away, then rounding and steps of a window of blocks are learned.

Source: Ding et al. 2025, CBQ (arXiv 2312.07950). No code of the whole method is public; `cfp` and `window` say what of
it is and what is as in the paper.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from research.quantize import cfp, rounding, window
from research.quantize.calibration import Outcome, Problem, batches, observe
from research.quantize.sequence import Schemes, folded, kernel
from research.quantize.window import Fixed, Learned

CRITERIA = {"paper": cfp.PAPER, "official": cfp.OFFICIAL}


@dataclasses.dataclass(frozen=True)
class Cbq:
    """CBQ's settings.

    Fields:
      window, overlap: blocks learned together, and those of them that the next window learns again.
      epochs: passes over the calibration data for each window; texts: at a time while learning.
      weight_rate, input_rate, factor_rate: learning rates of the steps of weights (a share of the step), of the steps
        of inputs (likewise), and of A1 and A2. The paper's are not known.
      rank: of A1 and A2; nearest: rounding begins at nearest, else as in the paper at halves.
      decide: weight of the regulariser that drives rounding to 0 or 1; hold: share of the steps without it.
      decided: learning runs with weights rounded up or down for good, see `window.run_quantized`; False is the paper's.
      truncate, scale: CBQ's pre-processing of weights and of activations, by a criterion of `CRITERIA` or "" for none.
      learn_inputs: inputs get one learned step; else tokens are rounded by their largest magnitude.
    """

    window: int = 2
    overlap: int = 1
    epochs: int = 3
    texts: int = 1
    weight_rate: float = 1e-3
    input_rate: float = 1e-3
    factor_rate: float = 1e-2
    rank: int = 5
    nearest: bool = True
    decide: float = 0.01
    hold: float = 0.2
    decided: bool = True
    truncate: str = "paper"
    scale: str = "official"
    learn_inputs: bool = True

    def __call__(self, problem: Problem) -> list[Outcome]:
        begun = self._begin(problem)
        learned, fixed = [list(part) for part in zip(*begun, strict=True)]
        wanted = _targets(problem)
        count = -(-len(problem.rough) // self.texts)
        steps = self.epochs * count
        rates = steps, self.weight_rate, self.input_rate, self.factor_rate
        moments = window.optimizer(*rates).init(learned)
        schemes = tuple(problem.schemes)
        for step in range(steps):
            if step % count == 0:
                order = np.asarray(jax.random.permutation(jax.random.fold_in(problem.key, step), len(problem.rough)))
            rows = order[(step % count) * self.texts :][: self.texts]
            learned, moments, _ = _learn(
                learned,
                moments,
                fixed,
                problem.rough[rows],
                tuple(target[rows] for target in wanted),
                jnp.float32(rounding.temperature(step, steps, self.hold)),
                jnp.float32(self.decide if step >= self.hold * steps else 0),
                problem.shared,
                blocks=problem.blocks,
                schemes=schemes,
                rates=rates,
                decided=self.decided,
            )
        finish = zip(learned, fixed, schemes, strict=True)
        return [
            Outcome({**rest.weights, **_finish(own, rest, scheme)}, own.inputs, _carried(own, rest))
            for own, rest, scheme in finish
        ]

    def _begin(self, problem: Problem) -> list[tuple[Learned, Fixed]]:
        """Where learning begins: of blocks that an earlier window learned, where it ended."""
        begun, x, own = [], problem.rough, zip(problem.weights, problem.schemes, problem.carried, strict=True)
        for index, (weights, schemes, carried) in enumerate(own):
            if carried is not None:
                begun.append(_restored(carried))
            if carried is None or index + 1 < len(problem.weights):
                x, ranges = _ranges(problem, weights, x)
            if carried is None:
                begun.append(self._prepare(problem, weights, schemes, ranges, jax.random.fold_in(problem.key, index)))
        return begun

    def _prepare(self, problem: Problem, weights, schemes: Schemes, ranges, key) -> tuple[Learned, Fixed]:
        """Outliers taken out of one block, and the start of its learning."""
        for fold in problem.blocks.folds(weights) if self.scale else ():
            paths = [kernel(layer) for layer in fold.readers]
            if f"{fold.maker}/scale" not in weights or not any(path in schemes for path in paths):
                continue
            factors = cfp.factors(*ranges[paths[0]], CRITERIA[self.scale])
            weights = folded(weights, fold, factors)
            ranges = ranges | {path: tuple(side / factors for side in ranges[path]) for path in paths}
        if self.truncate:
            weights = weights | {path: _truncate(weights[path], self.truncate) for path in schemes}
        largest = {path: jnp.max(jnp.abs(jnp.stack(ranges[path]))) for path in schemes}
        return window.start(weights, schemes, largest, key, self.rank, self.nearest, self.learn_inputs)


def _ranges(problem: Problem, weights, stream: np.ndarray) -> tuple[np.ndarray, dict]:
    """What leaves an unquantised block, and the (smallest, largest) value of each channel that enters its kernels."""
    paths = [kernel(layer) for stage in problem.blocks.plan.stages for layer in stage]
    state = {path: (jnp.full(len(weights[path]), jnp.inf), jnp.full(len(weights[path]), -jnp.inf)) for path in paths}
    left = np.empty_like(stream)
    for rows in batches(len(stream), problem.batch):
        left[rows], state = observe(problem.blocks, weights, stream[rows], problem.shared, reduce=_wider, state=state)
    return left, state


def _wider(state, seen):
    def of(path, low, high):
        rows = seen[path].reshape(-1, seen[path].shape[-1])
        return jnp.minimum(low, jnp.min(rows, axis=0)), jnp.maximum(high, jnp.max(rows, axis=0))

    return {path: of(path, *sides) for path, sides in state.items()}


@functools.partial(jax.jit, static_argnums=1)
def _truncate(w: jax.Array, criterion: str) -> jax.Array:
    return cfp.truncate(w, CRITERIA[criterion])


def _targets(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """What the unquantised window makes of the exact and of the rough input, on the host."""
    found = []
    for stream in (problem.exact, problem.rough):
        for weights in problem.weights:
            left = np.empty_like(stream)
            for rows in batches(len(stream), problem.batch):
                left[rows] = observe(problem.blocks, weights, stream[rows], problem.shared)[0]
            stream = left
        found.append(stream)
    return tuple(found)


@functools.partial(jax.jit, static_argnames=("blocks", "schemes", "rates", "decided"), donate_argnums=(0, 1))
def _learn(learned, moments, fixed, rough, wanted, beta, weight, shared, *, blocks, schemes, rates, decided):
    """`window.update` of blocks that are all computed alike."""
    own = [blocks.block(shared)] * len(schemes)
    rule = window.optimizer(*rates)
    options = {"blocks": own, "schemes": schemes, "weight": weight, "rule": rule, "decided": decided}
    return window.update(learned, moments, fixed, rough, wanted, beta, **options)


_finish = jax.jit(window.finish, static_argnames="schemes")


def _carried(learned: Learned, fixed: Fixed) -> dict:
    """Nested dicts of what the next window starts from."""
    factors = {path: {"a1": a1, "a2": a2} for path, (a1, a2) in learned.factors.items()}
    return {"learned": learned._replace(factors=factors)._asdict(), "fixed": fixed._asdict()}


def _restored(carried: Mapping) -> tuple[Learned, Fixed]:
    """The inverse of `_carried`; dicts that were empty are not in a file."""
    part = lambda kind, names: {name: dict(carried[kind].get(name, {})) for name in names}
    learned = Learned(**part("learned", Learned._fields))
    factors = {path: (own["a1"], own["a2"]) for path, own in learned.factors.items()}
    return jax.tree.map(jnp.asarray, (learned._replace(factors=factors), Fixed(**part("fixed", Fixed._fields))))
