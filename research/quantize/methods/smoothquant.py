"""SmoothQuant on a model: outliers of what norms give are moved into the kernels, which are rounded to nearest.

Source: Xiao et al. 2023 (arXiv 2211.10438) and the official `smoothquant/smooth.py` (commit c61476d7), whose fake
quantisation has kernels per channel by the rule "absmax" and activations per token.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from research.quantize import smoothquant
from research.quantize.calibration import Outcome, Problem
from research.quantize.methods.nearest import rounded
from research.quantize.methods.passes import observed
from research.quantize.sequence import folded, kernel


@dataclasses.dataclass(frozen=True)
class Smoothquant:
    """SmoothQuant; outliers are those of the unquantised model.

    Fields:
      alpha: from 0, outliers stay in the activations, to 1, all go into the kernels; the official 0.5 for OPT, 0.8 and
        more for LLaMA.
    """

    alpha: float = 0.5
    window: ClassVar[int] = 1
    overlap: ClassVar[int] = 0

    def __call__(self, problem: Problem) -> list[Outcome]:
        (weights,), (schemes,) = problem.weights, problem.schemes
        norms = [fold for fold in problem.blocks.folds(weights) if f"{fold.maker}/scale" in weights]
        read = {fold: [kernel(layer) for layer in fold.readers] for fold in norms}
        read = {fold: paths for fold, paths in read.items() if any(path in schemes for path in paths)}
        state = {paths[0]: jnp.zeros(len(weights[paths[0]]), problem.exact.dtype) for paths in read.values()}
        largest = observed(problem, weights, problem.exact, _larger, state)
        for fold, paths in read.items():
            factors = smoothquant.factors(largest[paths[0]], [weights[path] for path in paths], self.alpha)
            weights = folded(weights, fold, factors)
        return [Outcome(rounded(weights, schemes), {})]


def _larger(state: dict, seen: dict) -> dict:
    """The largest magnitude of each channel."""
    of = lambda x: jnp.max(jnp.abs(x.reshape(-1, x.shape[-1])), axis=0)
    return {path: jnp.maximum(largest, of(seen[path])) for path, largest in state.items()}
