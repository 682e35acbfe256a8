"""GPTQ on a model: kernels of a block are rounded stage by stage, each told of the errors of the stages before it.

Source: `llama.py` and `opt.py` of IST-DASLab/gptq (commit 2d65066e); the solver is `research.quantize.gptq`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax

from research.quantize import gptq
from research.quantize.calibration import Outcome, Problem, batches, observe
from research.quantize.grids import Form
from research.quantize.quantized import Quantized
from research.quantize.sequence import kernel


@dataclasses.dataclass(frozen=True)
class Gptq:
    """GPTQ; inputs are those of the quantised blocks before, rounded where the layer's are.

    Fields:
      damping, block, act_order, static_groups: see `research.quantize.gptq.gptq`.
      true_sequential: the layers of a stage (queries, keys and values; the output; ...) are rounded before what enters
        the next is looked at, `--true-sequential` of the official code; else all layers see the unrounded block.
    """

    damping: float = 0.01
    block: int = 128
    act_order: bool = False
    static_groups: bool = False
    true_sequential: bool = True
    window: ClassVar[int] = 1
    overlap: ClassVar[int] = 0

    def __call__(self, problem: Problem) -> list[Outcome]:
        (weights,), (schemes,) = problem.weights, problem.schemes
        stages = problem.blocks.plan.stages
        if not self.true_sequential:
            stages = (tuple(layer for stage in stages for layer in stage),)
        found = dict(weights)
        for stage in stages:
            paths = [kernel(layer) for layer in stage if kernel(layer) in schemes]
            if not paths:
                continue
            state = {path: gptq.second_moment(len(weights[path])) for path in paths}
            for rows in batches(len(problem.rough), problem.batch):
                x = problem.rough[rows]
                _, state = observe(problem.blocks, found, x, problem.shared, schemes, None, _add, state)
            for path in paths:
                found[path] = self._round(problem.first, path, weights[path], state[path], schemes[path].form)
        return [Outcome(found, {})]

    def _round(self, index: int, path: str, w: jax.Array, moment: gptq.Moment, form: Form) -> Quantized:
        order = {"act_order": self.act_order, "static_groups": self.static_groups}
        with naming(index, path):
            return gptq.gptq(w, moment, form, damping=self.damping, block=self.block, **order).weight


@contextlib.contextmanager
def naming(index: int, path: str) -> Iterator[None]:
    """Within it a ValueError names the layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layers_{index}/{path.removesuffix('/kernel')}: {error}") from None


def _add(state: dict, seen: dict) -> dict:
    return {path: gptq.add(moment, seen[path]) for path, moment in state.items()}
