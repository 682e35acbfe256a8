"""Passes over the calibration data of one block, a batch at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from research.quantize.calibration import UNTOUCHED, Problem, batches, observe
from research.quantize.sequence import Schemes


def observed(
    problem: Problem,
    weights: Mapping,
    stream: np.ndarray,
    reduce: Callable[[Any, dict], Any],
    state: Any,
    schemes: Schemes = UNTOUCHED,
) -> Any:
    """`state` after `reduce` has seen what a block's kernels are multiplied with; see `calibration.observe`."""
    for rows in batches(len(stream), problem.batch):
        _, state = observe(problem.blocks, weights, stream[rows], problem.shared, schemes, None, reduce, state)
    return state


def outputs(problem: Problem, weights: Mapping, stream: np.ndarray) -> np.ndarray:
    """What leaves an unquantised block, (S, N, C) on the host."""
    left = problem.room()
    for rows in batches(len(stream), problem.batch):
        left[rows] = observe(problem.blocks, weights, stream[rows], problem.shared)[0]
    return left
