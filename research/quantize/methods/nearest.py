"""Rounding to nearest (RTN), the baseline that looks at no data."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax

from research.quantize.calibration import Outcome, Problem
from research.quantize.quantized import quantize
from research.quantize.sequence import Schemes

_quantize = jax.jit(quantize, static_argnames="form")


def rounded(weights: Mapping[str, jax.Array], schemes: Schemes) -> dict:
    """The arrays of a block with the kernels that `schemes` name rounded to nearest."""
    return {**weights, **{path: _quantize(weights[path], form=scheme.form) for path, scheme in schemes.items()}}


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Every kernel to the nearest codes of its grid."""

    window: ClassVar[int] = 1
    overlap: ClassVar[int] = 0

    def __call__(self, problem: Problem) -> list[Outcome]:
        return [Outcome(rounded(problem.weights[0], problem.schemes[0]), {})]
