"""CBQ's windows: neighbouring blocks whose rounding and steps are learned together.

    learned, fixed = start(weights, schemes, ranges, key)                       # of each block of the window
    wanted = targets(blocks, [f.weights for f in fixed], exact, rough)          # once a batch
    learned, moments, parts = update(learned, moments, fixed, rough, wanted, beta, ...)
    finish(learned, fixed, schemes)                                             # arrays of few bits

`exact` enters the window after unquantised blocks, `rough` after the quantised ones before it. The loss has two
branches: the unquantised window's output from `exact`, which errors of earlier blocks must not spoil, and from `rough`,
the same input that the quantised window has (homologous reconstruction):

    loss = E(T(exact), Tq(rough)) + E(T(rough), Tq(rough)) + c sum(1 - |2 h - 1|^beta)

A block is any function `block(weights, x, enter)` from (B, N, C) to (B, N, C): `weights` is a dict of all its arrays,
and it passes through `enter(name, x)` what is multiplied by the weight `name`. Weights that a scheme names are
quantised with LoRA-Rounding (`rounding`), what enters them with a learned step, or without one token by token; nothing
else is.

Source: Ding et al. 2025, CBQ (arXiv 2312.07950, sections 3.1 and 3.2), whose training code is not public.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from research.core import optim
from research.layers.norm import accumulation_dtype
from research.quantize import fake, grids, reconstruction, rounding
from research.quantize.grids import Form, Grid
from research.quantize.quantized import Quantized, check

Weights = Mapping[str, jax.Array]
Enter = Callable[[str, jax.Array], jax.Array]
Block = Callable[[Weights, jax.Array, Enter], jax.Array]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What one weight and what enters it are quantised to: `form` with zero points, `inputs` bits, None for none."""

    form: Form
    inputs: int | None = None


class Learned(NamedTuple):
    """What is learned of one block, by the names of its quantised weights.

    steps: scales in the shape of `grids.fit`. inputs: steps of what enters, of any shape that broadcasts against it.
    factors: (A1, A2), (d, r) and (r, k) with d the first axis of the weight and k the product of its others.
    """

    steps: dict[str, jax.Array]
    inputs: dict[str, jax.Array]
    factors: dict[str, tuple[jax.Array, jax.Array]]


class Fixed(NamedTuple):
    """What stays of one block.

    weights: all its arrays. zeros, v0: of quantised ones, where v = v0 + A1 A2. down: of some, the codes without zero
    points and rounding; those of others are floor(w / s) with the step s that is learned.
    """

    weights: dict[str, jax.Array]
    zeros: dict[str, jax.Array]
    v0: dict[str, jax.Array]
    down: dict[str, jax.Array]


def start(
    weights: Weights,
    schemes: Mapping[str, Scheme],
    ranges: Weights,
    key: jax.Array,
    rank: int = 5,
    nearest: bool = True,
    learn_inputs: bool = True,
    fitted: Mapping[str, Grid] | None = None,
    leading: Weights | None = None,
) -> tuple[Learned, Fixed]:
    """Where learning begins: A1 is normal, A2 zero.

    Args:
      ranges: largest magnitudes of what enters the weights whose inputs have learned steps, by name.
      nearest: v0 rounds to nearest; False is the paper's form without v0, which begins with halves everywhere.
      learn_inputs: inputs have one learned step each, as in the paper; else tokens are rounded by their largest value.
      fitted: grids, in the shapes of `grids.fit`, of weights whose codes were found together and so stay, but for what
        is learned of their rounding, when steps change.
      leading: A1 of some weights, (d, rank), in place of normal numbers.
    Raises:
      ValueError: a form without zero points, or a scheme for a weight that is not there.
    """
    learned, fixed = Learned({}, {}, {}), Fixed(dict(weights), {}, {}, {})
    for own, (name, scheme) in zip(jax.random.split(key, len(schemes)), sorted(schemes.items()), strict=True):
        if name not in weights:
            raise ValueError(f"schemes: the block has no weight {name!r}, only {', '.join(sorted(weights))}")
        w = weights[name].astype(accumulation_dtype(weights[name]))
        grid = (fitted or {}).get(name) or grids.fit(w, scheme.form)
        if grid.zeros is None:
            raise ValueError(f"schemes: {name!r} has rule {scheme.form.rule!r}; learned rounding needs zero points")
        learned.steps[name], fixed.zeros[name] = grid
        parts, grid = _split(w, grid, scheme.form)
        ratio = grids.divide(parts, grid.scales)
        v0 = rounding.start(ratio) if nearest else jnp.zeros_like(parts)
        fixed.v0[name] = grids.unite(v0, w, scheme.form)
        if name in (fitted or {}):
            fixed.down[name] = grids.unite(jnp.floor(ratio), w, scheme.form)
        a1 = (leading or {}).get(name)
        a1 = jax.random.normal(own, (w.shape[0], rank), w.dtype) if a1 is None else a1
        learned.factors[name] = a1, jnp.zeros((rank, w.size // w.shape[0]), w.dtype)
        if scheme.inputs is not None and learn_inputs:
            largest = jnp.maximum(ranges[name].astype(w.dtype), grids.SMALLEST)
            learned.inputs[name] = largest / (2 ** (scheme.inputs - 1) - 1)
    return learned, fixed


def run(blocks: Sequence[Block], weights: Sequence[Weights], x: jax.Array) -> jax.Array:
    """Unquantised blocks, one after the other."""
    for block, arrays in zip(blocks, weights, strict=True):
        x = block(arrays, x, lambda name, entering: entering)
    return x


def run_quantized(
    blocks: Sequence[Block],
    learned: Sequence[Learned],
    fixed: Sequence[Fixed],
    schemes: Sequence[Mapping[str, Scheme]],
    x: jax.Array,
    decided: bool = False,
) -> jax.Array:
    """Blocks with the rounding that is being learned, and quantised inputs; differentiable in `learned` and x.

    Args:
      decided: every weight is rounded up or down, as in the end, with the gradient of what is learned; else, as in the
        paper, by a number between. With v0 of `start` that begins with the unquantised weights, and few of them are
        moved to either end by A1 A2 of low rank: what is learned is then not what is used.
    """
    for block, own, rest, scheme in zip(blocks, learned, fixed, schemes, strict=True):
        softened = {name: _soft(name, own, rest, scheme[name].form, decided) for name in scheme}
        x = block({**rest.weights, **softened}, x, rounded(scheme, own.inputs))
    return x


def targets(
    blocks: Sequence[Block], weights: Sequence[Weights], exact: jax.Array, rough: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the window should give: unquantised outputs from the exact input, and from the rough one."""
    return run(blocks, weights, exact), run(blocks, weights, rough)


def window_loss(
    learned: Sequence[Learned],
    fixed: Sequence[Fixed],
    rough: jax.Array,
    wanted: tuple[jax.Array, jax.Array],
    beta: jax.Array | float,
    *,
    blocks: Sequence[Block],
    schemes: Sequence[Mapping[str, Scheme]],
    weight: jax.Array | float = 0.01,
    decided: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss above and its parts `rec`, `homologous` and `com`; all but the first argument are held constant.

    Args:
      wanted: of `targets`.
      beta: exponent of the regulariser, see `rounding.temperature`; weight: of it, c.
      decided: see `run_quantized`; there is nothing to regularise then.
    """
    y = run_quantized(blocks, learned, fixed, schemes, rough, decided)
    pairs = () if decided else zip(learned, fixed, strict=True)
    vs = [_v(name, own, rest) for own, rest in pairs for name in own.factors]
    parts = {
        "rec": reconstruction.distance(wanted[0], y),
        "homologous": reconstruction.distance(wanted[1], y),
        "com": sum((rounding.undecided(rounding.share(v), beta) for v in vs), jnp.zeros((), y.dtype)),
    }
    return parts["rec"] + parts["homologous"] + weight * parts["com"], parts


def optimizer(steps: int, weights: float = 1e-3, inputs: float = 1e-4, factors: float = 1e-4):
    """Adam with a rate for each kind of `Learned`, on a cosine over `steps` updates, for a sequence of them.

    The rates of steps are shares of the step: 1e-3 is more than many a step of a language model's weights, and a step
    must stay positive. The paper's own rates are not known for sure; these follow what is reported of them.
    """

    def adam(rate, relative):
        scale = optax.stateless(lambda updates, own: jax.tree.map(jnp.multiply, updates, own))
        rule = optax.scale_by_learning_rate(optax.cosine_decay_schedule(rate, steps))
        return optax.chain(optax.scale_by_adam(), *([scale] if relative else []), rule)

    rules = {"steps": adam(weights, True), "inputs": adam(inputs, True), "factors": adam(factors, False)}
    return optax.partition(rules, lambda learned: [Learned(*Learned._fields) for _ in learned])


def update(
    learned: Sequence[Learned], moments: optax.OptState, *batch, rule: optax.GradientTransformation, **settings
) -> tuple[Sequence[Learned], optax.OptState, dict[str, jax.Array]]:
    """One step of `rule` along the gradient of `window_loss`, whose further arguments follow.

    Returns:
      What is learned, the state of the rule, and the parts of the loss with their sum as `total`.
    """
    (total, parts), slopes = jax.value_and_grad(window_loss, has_aux=True)(learned, *batch, **settings)
    learned, moments = optim.descend(rule, slopes, moments, learned)
    return learned, moments, {**parts, "total": total}


def finish(learned: Learned, fixed: Fixed, schemes: Mapping[str, Scheme]) -> dict[str, Quantized]:
    """The quantised weights of one block, every one rounded up or down for good."""
    return {name: _hard(name, learned, fixed, scheme.form) for name, scheme in schemes.items()}


def rounded(schemes: Mapping[str, Scheme], steps: Weights) -> Enter:
    """`enter` for quantised inputs: by their step where there is one, else each token by its largest magnitude."""

    def enter(name: str, x: jax.Array) -> jax.Array:
        bits = schemes[name].inputs if name in schemes else None
        if bits is None:
            return x
        if name in steps:
            return fake.stepped(x, steps[name], bits)
        return fake.fake_quantize(x, Form(bits, axis=-1, rule="absmax"))

    return enter


def _v(name: str, learned: Learned, fixed: Fixed) -> jax.Array:
    a1, a2 = learned.factors[name]
    return fixed.v0[name] + (a1 @ a2).reshape(fixed.v0[name].shape)


def _soft(name: str, learned: Learned, fixed: Fixed, form: Form, decided: bool = False) -> jax.Array:
    parts, grid = _parts(name, learned, fixed, form)
    v = _v(name, learned, fixed)
    added = rounding.share(v)
    added = grids.blocks(fake.straight_through((v >= 0).astype(v.dtype), added) if decided else added, form)
    soft = rounding.soft(parts, grid, added, form.bits, through=name not in fixed.down)
    return grids.unite(soft, fixed.weights[name], form)


def _hard(name: str, learned: Learned, fixed: Fixed, form: Form) -> Quantized:
    w, axis = fixed.weights[name], form.axis % fixed.weights[name].ndim
    parts, grid = _parts(name, learned, fixed, form)
    up = grids.blocks(_v(name, learned, fixed), form) >= 0
    codes = jnp.floor(grids.divide(parts, grid.scales)) + up.astype(parts.dtype) + grid.zeros
    codes = jnp.clip(codes, *grids.limits(form.bits, signed=False)).astype(jnp.uint8)
    codes = codes.reshape(*w.shape[:axis], -1, *w.shape[axis + 1 :])
    kept = learned.steps[name], fixed.zeros[name]
    return check(Quantized(codes, *kept, None, form.bits, axis, parts.shape[axis + 1], w.shape[axis]))


def _parts(name: str, learned: Learned, fixed: Fixed, form: Form) -> tuple[jax.Array, Grid]:
    """Groups of what is rounded, and the grid that broadcasts against them."""
    grid = Grid(learned.steps[name], fixed.zeros[name])
    if name not in fixed.down:
        return _split(fixed.weights[name], grid, form)
    down, grid = _split(fixed.down[name], grid, form)
    return (down + 0.5) * grid.scales, grid  # in the middle, so that division does not lead to another code


def _split(w: jax.Array, grid: Grid, form: Form) -> tuple[jax.Array, Grid]:
    """Groups of a weight in the dtype of its scales, and the grid that broadcasts against them."""
    axis = form.axis % w.ndim + 1
    return grids.blocks(w.astype(grid.scales.dtype), form), jax.tree.map(lambda a: jnp.expand_dims(a, axis), grid)
