"""CBQ on a model: outliers are cut off and scaled away, then rounding and steps of a window of blocks are learned.

Source: Ding et al. 2025, CBQ (arXiv 2312.07950). No code of the whole method is public; `cfp` and `window` say what of
it is and what is as in the paper.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.quantize import cfp, gptq, rounding, window
from research.quantize.calibration import Outcome, Problem, batches, observe
from research.quantize.grids import Grid
from research.quantize.methods.gptq import naming
from research.quantize.methods.passes import outputs
from research.quantize.sequence import folded, kernel
from research.quantize.window import Fixed, Learned

CRITERIA = {"paper": cfp.PAPER, "official": cfp.OFFICIAL}
STARTS, SPANS = ("nearest", "halves", "gptq"), ("inputs", "random")


class Seen(NamedTuple):
    """What entered a kernel: smallest and largest value of each channel, (K,), and the second moment."""

    low: jax.Array
    high: jax.Array
    moment: gptq.Moment


@dataclasses.dataclass(frozen=True)
class Cbq:
    """CBQ's settings; the defaults are what did best on a small LLaMA (research/quantize/README.md).

    The paper's form, as far as it is known, is `start="halves", span="random", decided=False, rank=5,
    truncate="paper", scale="paper", learn_inputs=True`.

    Fields:
      window, overlap: blocks learned together, and those of them that the next window learns again.
      epochs: passes over the calibration data for each window; texts: at a time while learning.
      weight_rate, input_rate, factor_rate: learning rates of the steps of weights (a share of the step), of the steps
        of inputs (likewise), and of A1 and A2. The paper's are not known.
      rank: of A1 and A2.
      start: rounding begins at "nearest", as in the paper at "halves", or where "gptq" ends.
      span: A1 begins with the leading directions of the "inputs", along which most of the error of the outputs lies, or
        as in the paper with "random" ones.
      decided: learning runs with weights rounded up or down for good, see `window.run_quantized`; False is the paper's.
      decide: without `decided`, weight of the regulariser that drives rounding to 0 or 1; hold: share of the steps
        without it.
      truncate, scale: CBQ's pre-processing of weights and of activations, by a criterion of `CRITERIA` or "" for none.
      learn_inputs: inputs get one learned step; else tokens are rounded by their largest magnitude.
    """

    window: int = 2
    overlap: int = 1
    epochs: int = 5
    texts: int = 4
    weight_rate: float = 2e-3
    input_rate: float = 1e-3
    factor_rate: float = 1e-3
    rank: int = 16
    start: str = "gptq"
    span: str = "inputs"
    decided: bool = True
    decide: float = 0.01
    hold: float = 0.2
    truncate: str = ""
    scale: str = "official"
    learn_inputs: bool = False

    def __post_init__(self):
        allowed = {"start": STARTS, "span": SPANS, "truncate": ("", *CRITERIA), "scale": ("", *CRITERIA)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"cbq: {name} {getattr(self, name)!r} is none of {', '.join(map(repr, values))}")

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
        begun, x = [], problem.rough
        for index, (weights, carried) in enumerate(zip(problem.weights, problem.carried, strict=True)):
            if carried is None:
                x, seen = _seen(problem, weights, x)
                begun.append(self._prepare(problem, index, seen))
            else:
                begun.append(_restored(carried))
                x = outputs(problem, weights, x)
        return begun

    def _prepare(self, problem: Problem, index: int, seen: dict[str, Seen]) -> tuple[Learned, Fixed]:
        """Outliers taken out of one block of the window, and the start of its learning."""
        weights, schemes = problem.weights[index], problem.schemes[index]
        for fold in problem.blocks.folds(weights) if self.scale else ():
            paths = [kernel(layer) for layer in fold.readers]
            if f"{fold.maker}/scale" not in weights or not any(path in schemes for path in paths):
                continue
            factors = cfp.factors(seen[paths[0]].low, seen[paths[0]].high, CRITERIA[self.scale])
            weights = folded(weights, fold, factors)
            seen = seen | {path: _divided(seen[path], factors) for path in paths}
        if self.truncate:
            weights = weights | {path: _truncate(weights[path], self.truncate) for path in schemes}
        largest = {path: jnp.max(jnp.maximum(-own.low, own.high)) for path, own in seen.items()}
        fitted = {}
        if self.start == "gptq":
            for path, scheme in schemes.items():
                with naming(problem.first + index, path):
                    order = {"act_order": True, "static_groups": True}  # groups stay those of neighbours
                    found = gptq.gptq(weights[path], seen[path].moment, scheme.form, **order)
                weights, fitted[path] = weights | {path: found.rounded}, Grid(found.weight.scales, found.weight.zeros)
        leading = {}
        if self.span == "inputs":
            leading = {path: _leading(seen[path].moment.hessian, self.rank) for path in schemes}
        key, nearest = jax.random.fold_in(problem.key, index), self.start != "halves"
        options = {"fitted": fitted, "leading": leading}
        return window.start(weights, schemes, largest, key, self.rank, nearest, self.learn_inputs, **options)


def _seen(problem: Problem, weights, stream: np.ndarray) -> tuple[np.ndarray, dict[str, Seen]]:
    """What leaves an unquantised block, and by path what enters its kernels."""
    paths = [kernel(layer) for stage in problem.blocks.plan.stages for layer in stage]
    nothing = lambda k: Seen(jnp.full(k, jnp.inf), jnp.full(k, -jnp.inf), gptq.second_moment(k))
    state, left = {path: nothing(len(weights[path])) for path in paths}, problem.room()
    for rows in batches(len(stream), problem.batch):
        left[rows], state = observe(problem.blocks, weights, stream[rows], problem.shared, reduce=_wider, state=state)
    return left, state


def _wider(state, seen):
    def of(x, own):
        rows = x.reshape(-1, x.shape[-1])
        sides = jnp.minimum(own.low, jnp.min(rows, axis=0)), jnp.maximum(own.high, jnp.max(rows, axis=0))
        return Seen(*sides, gptq.add(own.moment, x))

    return {path: of(seen[path], own) for path, own in state.items()}


def _divided(seen: Seen, factors: jax.Array) -> Seen:
    """What is seen once the channels are divided by factors."""
    hessian = seen.moment.hessian / (factors[:, None] * factors[None])
    return Seen(seen.low / factors, seen.high / factors, seen.moment._replace(hessian=hessian))


@functools.partial(jax.jit, static_argnums=1)
def _leading(hessian: jax.Array, rank: int) -> jax.Array:
    """Directions (K, rank) along which inputs are largest, as large as normal numbers."""
    _, directions = jnp.linalg.eigh(hessian)
    return directions[:, ::-1][:, :rank] * len(hessian) ** 0.5


@functools.partial(jax.jit, static_argnums=1)
def _truncate(w: jax.Array, criterion: str) -> jax.Array:
    return cfp.truncate(w, CRITERIA[criterion])


def _targets(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """What the unquantised window makes of the exact and of the rough input, on the host."""
    found = []
    for stream in (problem.exact, problem.rough):
        for weights in problem.weights:
            stream = outputs(problem, weights, stream)
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
