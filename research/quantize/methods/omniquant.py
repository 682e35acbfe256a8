"""OmniQuant on a model: how far each kernel is clipped, and how channels are scaled and shifted, is learned by blocks.

Learnable weight clipping (LWC) shrinks the range of each group by sigmoids; the learnable equivalent transformation
(LET) divides what norms give, and values, by factors, after taking shifts off, and the kernels and biases that read
them make up for it. Both learn together, through rounding, what brings a block's output from the quantised input close
to the unquantised one from the exact input.

Source: Shao et al. 2024 (arXiv 2308.13137) and the official `quantize/omniquant.py`, `quantize/utils.py`,
`models/transformation.py` and `generate_act_scale_shift.py` (commit 95fae1bd). As there, factors start from queries,
outputs and up projections alone, and shifts are only learned where inputs are rounded and all biases are there, as in
OPT. The official code rounds queries, keys and values in attention too, and scales queries against keys for that; here
they are not rounded, and a factor of a whole output would not change how its weights are, so there is none. Its
activations have zero points; here they are symmetric.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from research.core import optim
from research.language.causal import Shared
from research.layers.norm import accumulation_dtype
from research.quantize import grids, smoothquant
from research.quantize.calibration import Outcome, Problem, batches
from research.quantize.fake import fake_quantize
from research.quantize.grids import SMALLEST, Form, Grid
from research.quantize.methods.passes import observed, outputs
from research.quantize.quantized import quantize
from research.quantize.sequence import Blocks, Fold, Schemes, folded, kernel
from research.quantize.window import Enter

RULES = ("omniquant", "omniquant_symmetric")
LET = ("inputs", "always", "never")
OPEN = 4.0  # sigmoid(4) of the range is left at the start
LEAST = 0.01  # magnitude of a factor
_LEADING = ("q_proj", "o_proj", "up_proj", "fc1")  # readers whose weights decide where factors start


@dataclasses.dataclass(frozen=True)
class Omniquant:
    """OmniQuant; rules of the kernels' grids must be "omniquant" or "omniquant_symmetric".

    Fields:
      epochs: passes over the calibration data for each block; texts: at a time while learning.
      lwc: clipping is learned; lwc_rate: its learning rate.
      let: factors and shifts are learned where "inputs" are rounded, as in the official commands, "always" or "never";
        let_rate: their learning rate.
      alpha: of SmoothQuant, whose factors are the start.
      aug_loss: the unquantised output from the quantised input is a second target.
    """

    epochs: int = 20
    texts: int = 1
    lwc: bool = True
    lwc_rate: float = 1e-2
    let: str = "inputs"
    let_rate: float = 5e-3
    alpha: float = 0.5
    aug_loss: bool = False
    window: ClassVar[int] = 1
    overlap: ClassVar[int] = 0

    def __post_init__(self):
        if self.let not in LET:
            raise ValueError(f"let: {self.let!r} is none of {', '.join(LET)}")

    def __call__(self, problem: Problem) -> list[Outcome]:
        (weights,), (schemes,) = problem.weights, problem.schemes
        for path, scheme in schemes.items():
            if scheme.form.rule not in RULES:
                layer = f"layers_{problem.first}/{path.removesuffix('/kernel')}"
                raise ValueError(f"{layer}: OmniQuant needs rule {' or '.join(RULES)}, not {scheme.form.rule!r}")
        folds = self._folds(problem)
        learned = {**self._clipping(weights, schemes), **self._transformation(problem, folds)}
        rates = self.let_rate, self.lwc_rate
        moments = _optimizer(*rates).init(learned)
        static = {"blocks": problem.blocks, "schemes": schemes, "folds": folds, "rates": rates}
        streams = (problem.exact, problem.rough) if self.aug_loss else (problem.exact,)
        wanted = [outputs(problem, weights, stream) for stream in streams] if self.epochs else []
        for _ in range(self.epochs if schemes else 0):
            for rows in batches(len(problem.rough), self.texts):
                targets = tuple(target[rows] for target in wanted)
                x, shared = problem.rough[rows], problem.shared
                learned, moments = _learn(learned, moments, weights, x, targets, shared, **static)
        return [Outcome(_finish(learned, weights, schemes=schemes, folds=folds), {})]

    def _folds(self, problem: Problem) -> tuple[Fold, ...]:
        """Those with factors: of norms, and of values for the output."""
        (weights,), (schemes,) = problem.weights, problem.schemes
        if self.let == "never" or (self.let == "inputs" and all(s.inputs is None for s in schemes.values())):
            return ()
        of = lambda fold: f"{fold.maker}/scale" in weights or fold.maker == "self_attn/v_proj"
        read = lambda fold: any(kernel(layer) in schemes for layer in fold.readers)
        return tuple(fold for fold in problem.blocks.folds(weights) if of(fold) and read(fold))

    def _clipping(self, weights: Mapping, schemes: Schemes) -> dict[str, dict]:
        def start():
            fit = {path: functools.partial(grids.fit, form=scheme.form) for path, scheme in schemes.items()}
            shapes = {path: jax.eval_shape(fit[path], weights[path]).scales for path in schemes}
            return {path: jnp.full(scales.shape, OPEN, scales.dtype) for path, scales in shapes.items()}

        return {"up": start() if self.lwc else {}, "low": start() if self.lwc else {}}

    def _transformation(self, problem: Problem, folds: tuple[Fold, ...]) -> dict[str, dict]:
        (weights,), (schemes,) = problem.weights, problem.schemes
        first = {fold: kernel(fold.readers[0]) for fold in folds}
        zeros = {path: jnp.zeros(len(weights[path]), problem.exact.dtype) for path in first.values()}
        start = {path: (jnp.int32(0), zero, zero) for path, zero in zeros.items()}
        found = observed(problem, weights, problem.exact, _largest_and_middle, start) if folds else {}
        scales, shifts = {}, {}
        for fold in folds:
            _, largest, middle = found[first[fold]]
            leading = [weights[kernel(layer)] for layer in fold.readers if layer.split("/")[-1] in _LEADING]
            scales[fold.maker] = smoothquant.factors(jnp.maximum(largest, SMALLEST), leading, self.alpha)
            biased = all(f"{layer}/bias" in weights for layer in (fold.maker, *fold.readers))
            if biased and any(scheme.inputs is not None for scheme in schemes.values()):
                shifts[fold.maker] = middle
        return {"scales": jax.tree.map(_away_from_zero, scales), "shifts": shifts}


def transformed(weights: Mapping, folds: tuple[Fold, ...], scales: Mapping, shifts: Mapping) -> dict:
    """A block with the same outputs whose channels are shifted, then divided by `scales`, both (K,) by maker."""
    weights = dict(weights)
    for fold in folds:
        if fold.maker in shifts:
            weights[f"{fold.maker}/bias"] = weights[f"{fold.maker}/bias"] - shifts[fold.maker]
            for layer in fold.readers:
                weights[f"{layer}/bias"] = weights[f"{layer}/bias"] + shifts[fold.maker] @ weights[kernel(layer)]
        weights = folded(weights, fold, scales[fold.maker])
    return weights


def clipped_grid(w: jax.Array, form: Form, shrink: tuple | None) -> Grid:
    """That of a clipped weight, in the shapes of `grids.fit`; `shrink` as of `grids.omniquant`, in the same shapes."""
    axis = form.axis % w.ndim + 1
    parts = grids.blocks(w.astype(accumulation_dtype(w)), form)
    shrink = jax.tree.map(lambda a: jnp.expand_dims(a, axis), shrink)
    grid = grids.omniquant(parts, form.bits, (axis,), form.rule == "omniquant_symmetric", shrink)
    return jax.tree.map(lambda a: jnp.squeeze(a, axis), grid)


def _changed(learned: Mapping, weights: Mapping, schemes: Schemes, folds: tuple[Fold, ...]) -> tuple[dict, dict]:
    """The transformed block, and the grids of its kernels."""
    weights = transformed(weights, folds, learned["scales"], learned["shifts"])
    sides = learned["up"], learned["low"]
    shrink = {path: tuple(jax.nn.sigmoid(side[path]) for side in sides) if learned["up"] else None for path in schemes}
    return weights, {path: clipped_grid(weights[path], s.form, shrink[path]) for path, s in schemes.items()}


def _loss(learned, weights, x, wanted, shared: Shared, blocks: Blocks, schemes: Schemes, folds) -> jax.Array:
    weights, grid = _changed(learned, weights, schemes, folds)
    few = {path: fake_quantize(weights[path], scheme.form, grid[path]) for path, scheme in schemes.items()}
    y = blocks.block(shared)({**weights, **few}, x, _rounded(schemes))
    return sum(jnp.mean(jnp.square(y - target)) for target in wanted)


def _rounded(schemes: Schemes) -> Enter:
    """As `window.rounded`, but with the gradient of each token's scale, which tells outliers what they cost."""

    def enter(path: str, x: jax.Array) -> jax.Array:
        if path not in schemes or schemes[path].inputs is None:
            return x
        form = Form(schemes[path].inputs, axis=-1, rule="absmax")
        wide = x.astype(accumulation_dtype(x))
        outlier = grids.end(wide, (x.ndim - 1,), lambda x, **axis: jnp.argmax(jnp.abs(x), **axis))
        scales = grids.divide(jnp.maximum(jnp.abs(outlier), SMALLEST), 2 ** (form.bits - 1) - 1)
        return fake_quantize(x, form, Grid(scales, None))

    return enter


def _optimizer(let_rate: float, lwc_rate: float) -> optax.GradientTransformation:
    labels = {"up": "lwc", "low": "lwc", "scales": "let", "shifts": "let"}
    return optax.partition({"lwc": optax.adam(lwc_rate), "let": optax.adam(let_rate)}, labels)


@functools.partial(jax.jit, static_argnames=("blocks", "schemes", "folds", "rates"), donate_argnums=(0, 1))
def _learn(learned, moments, weights, x, wanted, shared, *, blocks, schemes, folds, rates) -> tuple[dict, Any]:
    slopes = jax.grad(_loss)(learned, weights, x, wanted, shared, blocks, schemes, folds)
    learned, moments = optim.descend(_optimizer(*rates), slopes, moments, learned)
    return {**learned, "scales": jax.tree.map(_away_from_zero, learned["scales"])}, moments


@functools.partial(jax.jit, static_argnames=("schemes", "folds"))
def _finish(learned, weights, *, schemes, folds) -> dict:
    weights, grid = _changed(learned, weights, schemes, folds)
    return {**weights, **{path: quantize(weights[path], s.form, grid[path]) for path, s in schemes.items()}}


def _away_from_zero(factors: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(factors) < LEAST, jnp.where(factors < 0, -LEAST, LEAST).astype(factors.dtype), factors)


def _largest_and_middle(state: dict, seen: dict) -> dict:
    """(texts, largest magnitude, middle of the range) of each channel; the middle is a slow mean over texts."""

    def next_text(state, x):
        texts, largest, middle = state
        low, high = jnp.min(x, axis=0), jnp.max(x, axis=0)
        own = (low + high) / 2
        middle = jnp.where(texts == 0, own, 0.99 * middle + 0.01 * own)
        return (texts + 1, jnp.maximum(largest, jnp.maximum(high, -low)), middle), None

    return {path: jax.lax.scan(next_text, own, seen[path])[0] for path, own in state.items()}
