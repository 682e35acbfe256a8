"""Rounding to nearest (RTN), the baseline that looks at no data."""

import dataclasses
from typing import ClassVar

import jax

from research.quantize.calibration import Outcome, Problem
from research.quantize.quantized import quantize

_quantize = jax.jit(quantize, static_argnames="form")


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Every kernel to the nearest codes of its grid."""

    window: ClassVar[int] = 1
    overlap: ClassVar[int] = 0

    def __call__(self, problem: Problem) -> list[Outcome]:
        (weights,), (schemes,) = problem.weights, problem.schemes
        few = {path: _quantize(weights[path], form=scheme.form) for path, scheme in schemes.items()}
        return [Outcome(weights | few, {})]
