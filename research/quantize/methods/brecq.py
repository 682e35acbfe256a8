"""BRECQ and AdaRound on a model: each weight learns whether it is rounded up or down, then inputs learn their steps.

The loss is the squared error of a block's output (BRECQ) or of each layer's (AdaRound), a sum over channels and a mean
over tokens, from the quantised input and towards the unquantised output from the exact one, plus the regulariser of
`rounding` that drives every weight to a decision. What is learned is a number for each weight, CBQ's v0; the rest is
done by CBQ's windows, with factors of rank 0.

Source: Li et al. 2021, BRECQ (arXiv 2102.05426), and the official `main_imagenet.py`, `quant/block_recon.py` and
`quant/quant_layer.py` (commit e455d62e); Nagel et al. 2020, AdaRound (arXiv 2004.10568). The official grid is that of
the rule "gptq_mse", but for ranges without 0. There, all weights are learned before any inputs, which have zero points;
here a block's inputs are learned before the next block's weights, and are symmetric.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import freeze

from research.core import optim
from research.language.causal import Shared
from research.quantize import fake, rounding, window
from research.quantize.calibration import UNTOUCHED, Outcome, Problem, batches, observe
from research.quantize.grids import NORM, SHRINKS, SMALLEST
from research.quantize.methods.passes import observed, outputs
from research.quantize.quantized import dequantize
from research.quantize.sequence import Blocks, Schemes, kernel, real, tapped

UNITS = ("block", "layer")
FIRST_TEXTS = 64  # decide where steps of inputs begin
_AS_IS = window.rounded(UNTOUCHED, {})


@dataclasses.dataclass(frozen=True)
class Brecq:
    """BRECQ, or AdaRound by `unit="layer"`; rules of the kernels' grids must have zero points.

    Fields:
      iterations: steps for each block or layer; texts: at a time, drawn anew each step.
      rate: Adam's learning rate; decide: weight of the regulariser; warm_up: share of the steps without it.
      unit: whose output is to be kept, "block" or "layer".
      input_iterations, input_rate: of the steps of inputs, where these are rounded; the rate falls along a cosine.
    """

    iterations: int = 20000
    texts: int = 32
    rate: float = 1e-3
    decide: float = 0.01
    warm_up: float = 0.2
    unit: str = "block"
    input_iterations: int = 5000
    input_rate: float = 4e-4
    window: ClassVar[int] = 1
    overlap: ClassVar[int] = 0

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit: {self.unit!r} is none of {', '.join(UNITS)}")

    def __call__(self, problem: Problem) -> list[Outcome]:
        (weights,), (schemes,) = problem.weights, problem.schemes
        if not schemes:
            return [Outcome(weights, {})]
        rng = np.random.default_rng(np.asarray(jax.random.key_data(problem.key)))
        wanted = outputs(problem, weights, problem.exact)
        plain = freeze({path: dataclasses.replace(scheme, inputs=None) for path, scheme in schemes.items()})
        if self.unit == "block":
            few = self._decided(problem, weights, plain, problem.rough, wanted, rng, problem.blocks)
        else:
            few = self._layers(problem, plain, rng)
        found = {**weights, **few}
        if all(scheme.inputs is None for scheme in schemes.values()):
            return [Outcome(found, {})]
        return [Outcome(found, self._steps(problem, real(found), wanted, rng))]

    def _decided(self, problem: Problem, weights, schemes: Schemes, x, wanted, rng, blocks: Blocks | None) -> dict:
        """Kernels in few bits for which what leaves a block, or with None a single layer, is near what is wanted."""
        learned, zeros, v = _start(weights, problem.key, schemes=schemes)
        fixed, moments = window.Fixed(weights, zeros, {}, {}), optax.adam(self.rate).init(v)
        for step in range(1, self.iterations + 1):
            rows = _drawn(rng, len(x), self.texts)
            beta = jnp.float32(rounding.temperature(step, self.iterations, self.warm_up))
            weight = jnp.float32(self.decide if step >= self.warm_up * self.iterations else 0)
            batch = x[rows], wanted[rows], beta, weight, problem.shared
            v, moments = _learn(v, moments, learned, fixed, *batch, blocks=blocks, schemes=schemes, rate=self.rate)
        return _finish(learned, fixed._replace(v0=v), schemes=schemes)

    def _layers(self, problem: Problem, schemes: Schemes, rng) -> dict:
        """Layer after layer, each with what enters it after those before it."""
        (weights,), few, current = problem.weights, {}, dict(problem.weights[0])
        for stage in problem.blocks.plan.stages:
            paths = [kernel(layer) for layer in stage if kernel(layer) in schemes]
            if not paths:
                continue
            exact = _entering(problem, weights, problem.exact, paths[0])
            rough = _entering(problem, current, problem.rough, paths[0])
            for path in paths:
                wanted, own = exact @ np.asarray(weights[path]), freeze({_LAYER: schemes[path]})
                few[path] = self._decided(problem, {_LAYER: weights[path]}, own, rough, wanted, rng, None)[_LAYER]
                current[path] = dequantize(few[path], weights[path].dtype)
        return few

    def _steps(self, problem: Problem, weights: Mapping, wanted: np.ndarray, rng) -> dict[str, jax.Array]:
        static = {"blocks": problem.blocks, "schemes": problem.schemes[0]}
        steps = _first_steps(problem, weights)
        rates = self.input_rate, self.input_iterations
        moments = _falling(*rates).init(steps)
        for _ in range(self.input_iterations):
            rows = _drawn(rng, len(wanted), self.texts)
            batch = problem.exact[rows], wanted[rows], problem.shared
            steps, moments = _learn_steps(steps, moments, weights, *batch, **static, rates=rates)
        return steps


_LAYER = "kernel"


def _layer(weights: Mapping, x: jax.Array, enter: window.Enter) -> jax.Array:
    """A single layer as a block."""
    return enter(_LAYER, x) @ weights[_LAYER]


@functools.partial(jax.jit, static_argnames="schemes")
def _start(weights: Mapping, key: jax.Array, *, schemes: Schemes) -> tuple[window.Learned, dict, dict]:
    """Grids, and the v with which nothing is rounded."""
    learned, fixed = window.start(weights, schemes, {}, key, rank=0, learn_inputs=False)
    return learned, fixed.zeros, fixed.v0


def _loss(v, learned, fixed, x, wanted, beta, weight, run: window.Block, schemes: Schemes) -> jax.Array:
    y = window.run_quantized([run], [learned], [fixed._replace(v0=v)], [schemes], x)
    undecided = sum(rounding.undecided(rounding.share(own), beta) for own in v.values())
    return jnp.mean(jnp.sum(jnp.square(y - wanted), axis=-1)) + weight * undecided


@functools.partial(jax.jit, static_argnames=("blocks", "schemes", "rate"), donate_argnums=(0, 1))
def _learn(v, moments, learned, fixed, x, wanted, beta, weight, shared: Shared, *, blocks, schemes, rate):
    run = _layer if blocks is None else blocks.block(shared)
    slopes = jax.grad(_loss)(v, learned, fixed, x, wanted, beta, weight, run, schemes)
    return optim.descend(optax.adam(rate), slopes, moments, v)


_finish = jax.jit(window.finish, static_argnames="schemes")


@functools.partial(jax.jit, static_argnames=("blocks", "schemes", "rates"), donate_argnums=(0, 1))
def _learn_steps(steps, moments, weights, x, wanted, shared: Shared, *, blocks: Blocks, schemes, rates):
    def loss(steps):
        y = blocks.block(shared)(weights, x, window.rounded(schemes, steps))
        return jnp.mean(jnp.sum(jnp.abs(y - wanted) ** NORM, axis=-1))

    steps, moments = optim.descend(_falling(*rates), jax.grad(loss)(steps), moments, steps)
    return jax.tree.map(lambda step: jnp.maximum(step, SMALLEST), steps), moments


def _falling(rate: float, iterations: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(rate, max(iterations, 1)))


def _drawn(rng: np.random.Generator, count: int, texts: int) -> np.ndarray:
    return rng.choice(count, min(texts, count), replace=False)


def _entering(problem: Problem, weights: Mapping, stream: np.ndarray, path: str) -> np.ndarray:
    """What enters a layer, (S, N, K) on the host."""
    found = []
    for rows in batches(len(stream), problem.batch):
        found.append(np.asarray(observe(problem.blocks, weights, stream[rows], problem.shared, reduce=_seen)[1][path]))
    return np.concatenate(found)


def _seen(state: None, seen: dict) -> dict:
    return seen


def _first_steps(problem: Problem, weights: Mapping) -> dict[str, jax.Array]:
    """Steps of inputs with the least error of the inputs themselves, among shrunk ranges as in GPTQ's search."""
    (schemes,), stream = problem.schemes, problem.rough[:FIRST_TEXTS]
    rounded = {path: scheme.inputs for path, scheme in schemes.items() if scheme.inputs is not None}
    zero = jnp.zeros((), problem.rough.dtype)
    largest = observed(problem, weights, stream, _largest, dict.fromkeys(rounded, zero))
    widest = {path: jnp.maximum(top, SMALLEST) / (2 ** (rounded[path] - 1) - 1) for path, top in largest.items()}
    errors = dict.fromkeys(rounded, jnp.zeros(SHRINKS, problem.rough.dtype))
    for rows in batches(len(stream), problem.batch):
        of = problem.blocks, weights, stream[rows], problem.shared
        errors = jax.tree.map(jnp.add, errors, _range_errors(*of, widest, schemes=schemes))
    return {path: widest[path] * (1 - jnp.argmin(errors[path]).astype(zero.dtype) / 100) for path in rounded}


def _largest(state: dict, seen: dict) -> dict:
    return {path: jnp.maximum(top, jnp.max(jnp.abs(seen[path]))) for path, top in state.items()}


@functools.partial(jax.jit, static_argnames=("blocks", "schemes"))
def _range_errors(blocks: Blocks, weights, x, shared: Shared, widest: Mapping, *, schemes: Schemes) -> dict:
    seen: dict[str, jax.Array] = {}
    blocks.block(shared)(weights, x, tapped(_AS_IS, seen))

    def of(path: str, step: jax.Array) -> Callable[[jax.Array], jax.Array]:
        def error(shrink):
            rounded = fake.stepped(seen[path], step * (1 - shrink / 100), schemes[path].inputs)
            return jnp.sum(jnp.abs(rounded - seen[path]) ** NORM)

        return error

    shrinks = jnp.arange(SHRINKS, dtype=x.dtype)
    return {path: jax.lax.map(of(path, step), shrinks) for path, step in widest.items()}
