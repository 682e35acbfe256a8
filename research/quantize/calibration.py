"""Calibration: a language model is quantised a few blocks at a time, with no more than those on the device.

    found = calibrate(model, params, tokens, settings, Gptq())          # of research.quantize.methods
    packed = rules.pack_params(found.params)

What enters the blocks stays on the host, or in files where it does not fit (`folder`), twice: `exact` after
unquantised blocks, `rough` after quantised ones. A method is given a `Problem`, a window of neighbouring blocks with
both inputs, and returns an `Outcome` for each; the first `window - overlap` of them are then final and the window moves
on. With a `folder`, what is done is on disk after each window and the same call goes on from there.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from research.core import storage
from research.language.causal import CausalModel, Shared
from research.quantize import rules, window
from research.quantize.rules import Rule
from research.quantize.saved import Store
from research.quantize.sequence import Blocks, Schemes, kernel, real, tapped

LOG = logging.getLogger(__name__)
OUTPUT = "output"  # stands among the paths of kernels for what leaves the block
UNTOUCHED = Schemes()


class Outcome(NamedTuple):
    """What a method makes of one block.

    Fields:
      weights: the block's arrays, `Quantized` in the place of kernels; norms may have changed.
      steps: of inputs that have one learned step, by the kernels' paths; others are rounded token by token.
      carried: nested dicts of arrays that the method wants to find when the block stands in the next window too.
    """

    weights: dict[str, Any]
    steps: dict[str, jax.Array]
    carried: Any = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """A window of neighbouring blocks to be quantised.

    Fields:
      blocks: how blocks are computed; first: index of the window's first block.
      weights: unquantised arrays of each block, by slash path; schemes: what each becomes.
      exact, rough: what enters the window after unquantised and after quantised blocks, (S, N, C) on the host.
      shared: what blocks are given beside their input.
      carried: of each block, from the window before; None where it is new.
      key: randomness of this window.
      batch: texts at a time in passes without learning.
      folder: where activations are kept, see `room`; "" for memory.
    """

    blocks: Blocks
    first: int
    weights: Sequence[dict[str, jax.Array]]
    schemes: Sequence[Schemes]
    exact: np.ndarray
    rough: np.ndarray
    shared: Shared
    carried: Sequence[Any]
    key: jax.Array
    batch: int
    folder: str | os.PathLike = ""

    def room(self) -> np.ndarray:
        """An array for activations like `exact`; in a file that vanishes with it, where activations are in files."""
        if not self.folder:
            return np.empty_like(self.exact)
        with tempfile.TemporaryFile(dir=storage.folder(self.folder)) as file:
            return np.memmap(file, self.exact.dtype, "w+", shape=self.exact.shape)


class Method(Protocol):
    """A way to quantise windows of `window` blocks, neighbours sharing `overlap`: a frozen dataclass of settings."""

    window: int
    overlap: int

    def __call__(self, problem: Problem) -> list[Outcome]: ...


class Calibrated(NamedTuple):
    """A quantised model.

    Fields:
      params: all parameters, on the host, `Quantized` in the place of kernels.
      steps: learned steps of inputs by layer path (`layers_0/mlp/up_proj`), for `rules.apply`; {} where none were.
      errors: of each block, the squared difference of what leaves it after quantised and after unquantised blocks,
        relative to the squares of the latter.
    """

    params: dict
    steps: dict[str, np.ndarray]
    errors: list[float]


def calibrate(
    model: CausalModel,
    params: Mapping,
    tokens: np.ndarray,
    settings: Sequence[Rule],
    method: Method,
    *,
    seed: int = 0,
    batch: int = 8,
    folder: str | os.PathLike = "",
    progress: Callable[[str], None] = LOG.info,
) -> Calibrated:
    """Quantises the blocks of a causal language model; embeddings and head stay as they are.

    Args:
      model, params: of `research.language`; parameters may, and large ones should, be on the host.
      tokens: calibration texts (S, N) int.
      settings: see `research.quantize.rules`. Rules see the paths of all layers; the first found decides.
      method: of `research.quantize.methods`.
      seed: of what the method draws.
      batch: texts at a time in passes without learning; the last may have fewer.
      folder: keeps activations and finished blocks there instead of in memory, and resumes what it holds.
      progress: told one line for each window.
    Raises:
      ValueError: no calibration data, a model whose blocks are not known, activations that are not finite, or a rule,
        group or method that does not fit.
      UserError: `folder` holds a calibration with other settings, model or data.
    """
    tokens, settings, blocks = np.asarray(tokens), tuple(settings), Blocks(model)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"calibration data of shape {tokens.shape}: give texts (S, N), one window of tokens at least")
    if not 0 <= method.overlap < method.window:
        raise ValueError(f"overlap: {method.overlap} blocks is not from 0 to below the window's {method.window}")
    walk = _Walk(blocks, params, _schemes(blocks, params, settings), batch, folder)
    store = Store(folder, _identity(model, params, tokens, settings, method, seed)) if folder else None
    walk.start(tokens)
    for index in range(store.done() if store else 0):
        walk.advance(index, Outcome(*store.block(index)))
    carried, started, resumed = store.carried() if store else {}, time.monotonic(), len(walk.done)
    while (first := len(walk.done)) < blocks.count:
        inside = range(first, min(first + method.window, blocks.count))
        if len(inside) > 1:  # what is learned in common would spread what is not finite; `advance` looks at each block
            walk.check(inside)
        key = jax.random.fold_in(jax.random.key(seed), first)
        outcomes = method(walk.problem(inside, [carried.get(i) for i in inside], key))
        outcomes = jax.device_get(outcomes)
        final = len(inside) if inside.stop == blocks.count else method.window - method.overlap
        for index, outcome in zip(inside[:final], outcomes, strict=False):
            walk.advance(index, outcome._replace(carried=None))
        carried = {index: outcome.carried for index, outcome in zip(inside[final:], outcomes[final:], strict=True)}
        if store:
            store.write(first, [outcome[:2] for outcome in walk.done[first:]], carried)
        seconds = (time.monotonic() - started) / (len(walk.done) - resumed) * (blocks.count - len(walk.done))
        progress(
            f"blocks {inside[0]} to {inside[-1]} of {blocks.count}: relative error {walk.errors[-1]:.2e}, "
            f"{seconds:.0f} s left"
        )
    return walk.result()


def draw(tokens: np.ndarray, texts: int, context: int, seed: int = 0) -> np.ndarray:
    """Calibration texts (texts, context) int32: windows that begin at random places of a text (T,), GPTQ's protocol.

    Raises:
      ValueError: no texts asked for, or a text that is shorter than a window.
    """
    tokens = np.asarray(tokens, np.int32).reshape(-1)
    if texts < 1 or context < 1:
        raise ValueError(f"texts={texts} of context={context} tokens: calibration needs at least one of each")
    if len(tokens) < context:
        raise ValueError(f"context={context}: the calibration text has {len(tokens)} tokens: give more, or lower it")
    places = np.random.default_rng(seed).integers(0, len(tokens) - context + 1, texts)
    return np.stack([tokens[place : place + context] for place in places])


class _Walk:
    """Where calibration stands: the activations before the next block, and what was made of those before it."""

    def __init__(self, blocks: Blocks, params: Mapping, schemes: list[Schemes], batch: int, folder: str | os.PathLike):
        self.blocks, self.params, self.schemes, self.batch, self.folder = blocks, params, schemes, batch, folder
        self.done: list[Outcome] = []
        self.errors: list[float] = []

    def start(self, tokens: np.ndarray) -> None:
        begin = jax.jit(self.blocks.start)
        outer = {name: value for name, value in self.params.items() if not name.startswith("layers_")}
        x, self.shared = begin(outer, tokens[:1])
        shape = (*tokens.shape, x.shape[-1])
        self.exact, self.rough = (_array(self.folder, name, shape, x.dtype) for name in ("exact", "rough"))
        for rows in batches(len(tokens), self.batch):
            self.exact[rows] = self.rough[rows] = begin(outer, tokens[rows])[0]

    def problem(self, inside: range, carried: Sequence[Any], key: jax.Array) -> Problem:
        weights = [jax.tree.map(jnp.asarray, self.blocks.own(self.params, index)) for index in inside]
        schemes = [self.schemes[index] for index in inside]
        given = self.exact, self.rough, self.shared, carried, key, self.batch, self.folder
        return Problem(self.blocks, inside[0], weights, schemes, *given)

    def check(self, inside: range) -> None:
        """Raises ValueError for a window whose unquantised blocks give activations that are not finite."""
        weights = [jax.tree.map(jnp.asarray, self.blocks.own(self.params, index)) for index in inside]
        for rows in batches(len(self.exact), self.batch):
            x = self.exact[rows]
            for index, own in zip(inside, weights, strict=True):
                x, finite = observe(self.blocks, own, x, self.shared, reduce=all_finite)
                check_finite(self.blocks, index, finite, "unquantised")

    def advance(self, index: int, outcome: Outcome) -> None:
        """Moves both activations behind a block, in place."""
        own, scheme = jax.tree.map(jnp.asarray, self.blocks.own(self.params, index)), self.schemes[index]
        rounded = jax.tree.map(jnp.asarray, outcome.weights), outcome.steps
        error = square = 0.0
        for rows in batches(len(self.exact), self.batch):
            run = functools.partial(observe, self.blocks, shared=self.shared, reduce=all_finite)
            exact, finite = run(own, self.exact[rows])
            check_finite(self.blocks, index, finite, "unquantised")
            other, finite = run(rounded[0], self.rough[rows], schemes=scheme, steps=rounded[1])
            check_finite(self.blocks, index, finite, "quantised")
            self.exact[rows], self.rough[rows] = exact, other = np.asarray(exact), np.asarray(other)
            error += float(np.sum(np.square(exact.astype(np.float64) - other)))
            square += float(np.sum(np.square(exact.astype(np.float64))))
        self.errors.append(error / max(square, np.finfo(np.float64).tiny))
        self.done.append(outcome)

    def result(self) -> Calibrated:
        params = jax.device_get({name: own for name, own in self.params.items() if not name.startswith("layers_")})
        steps = {}
        for index, outcome in enumerate(self.done):
            params[f"layers_{index}"] = traverse_util.unflatten_dict(outcome.weights, sep="/")
            for path, step in outcome.steps.items():
                steps[f"layers_{index}/{path.removesuffix('/kernel')}"] = np.asarray(step)
        return Calibrated(params, steps, self.errors)


def batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive rows, `size` at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@functools.partial(jax.jit, static_argnames=("blocks", "schemes", "reduce"))
def observe(
    blocks: Blocks,
    weights: Mapping,
    x: jax.Array,
    shared: Shared,
    schemes: Schemes = UNTOUCHED,
    steps: Mapping | None = None,
    reduce: Callable[[Any, dict[str, jax.Array]], Any] | None = None,
    state: Any = None,
) -> tuple[jax.Array, Any]:
    """One block on one batch, and what `reduce(state, seen)` makes of all that is multiplied by kernels, by path.

    Args:
      weights: of the block; kernels may have few bits.
      schemes, steps: of inputs that are rounded, see `window.rounded`.
      reduce: a function of a module, for it decides about what is compiled.
    """
    seen: dict[str, jax.Array] = {}
    y = blocks.block(shared)(real(weights), x, tapped(window.rounded(schemes, steps or {}), seen))
    return y, (None if reduce is None else reduce(state, seen | {OUTPUT: y}))


def all_finite(state: None, seen: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """For `observe`: whether all numbers are finite, by path."""
    return {path: jnp.all(jnp.isfinite(x)) for path, x in seen.items()}


def check_finite(blocks: Blocks, index: int, finite: Mapping[str, jax.Array], kind: str) -> None:
    """Raises ValueError naming the first layer of block `index` whose activations are not finite."""
    for path in (*(kernel(layer) for stage in blocks.plan.stages for layer in stage), OUTPUT):
        if not finite[path]:
            layer = f"layers_{index}/{path.removesuffix('/kernel')}".removesuffix(f"/{OUTPUT}")
            raise ValueError(
                f"{layer}: activations that {'leave' if path == OUTPUT else 'enter'} it ({kind}) are NaN or infinite: "
                "look at the weights before it, or take a dtype of wider range"
            )


def _schemes(blocks: Blocks, params: Mapping, settings: tuple[Rule, ...]) -> list[Schemes]:
    """Of all blocks; rules and groups are checked against the parameters before anything is computed."""
    for layer, rule in rules.match(params, settings).items():
        if not layer.startswith("layers_") and (rule.bits or rule.activation_bits):
            raise ValueError(
                f"rule {rule.path!r} decides about {layer}, which calibration leaves as it is: write the rule as "
                '"^layers_" or put Rule("^(?!layers_)") before it'
            )
        if rule.activation_bits and not rule.bits:
            raise ValueError(f"rule {rule.path!r} has activation_bits but no bits: calibration rounds both or weights")
    jax.eval_shape(lambda tree: rules.quantize_params(tree, settings), dict(params))
    return [blocks.schemes(settings, index) for index in range(blocks.count)]


def _array(folder: str | os.PathLike, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
    if not folder:
        return np.zeros(shape, dtype)
    root = storage.folder(folder)
    root.mkdir(parents=True, exist_ok=True)
    return np.memmap(root / f"{name}.activations", dtype, "w+", shape=shape)


def _identity(model, params, tokens, settings, method, seed) -> dict[str, Any]:
    """What decides about the result, as JSON: the weights and the data by their hash."""
    weights = hashlib.sha256()
    for path, array in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        weights.update(path.encode() + np.ascontiguousarray(array).tobytes())
    return {
        "model": repr(model),
        "weights": weights.hexdigest()[:16],
        "data": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()[:16],
        "texts": list(tokens.shape),
        "settings": [repr(rule) for rule in settings],
        "method": repr(method),
        "seed": seed,
    }
