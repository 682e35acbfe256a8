"""Losses by name, for configs and notebooks; each name is that of a function in the module beside it."""

import difflib
from collections.abc import Callable, Mapping

from research.distill import ground_truth, hints, logits, ofa

# loss(student, teacher, labels=None, **options) -> (B,), or a scalar where it relates the examples to each other.
LOSSES: dict[str, Callable] = {
    "kd": logits.kd,
    "hard": logits.hard,
    "kd_and_labels": logits.kd_and_labels,
    "bkd": logits.bkd,
    "dkd": logits.dkd,
    "dist": logits.dist,
    "ofa": ofa.ofa,
}
# Those of LOSSES that return a scalar: the caller chooses their batch, `research.core.scope.by_group`.
RELATIONAL = frozenset({"dist"})
# loss(logits, labels, **options) -> (B,)
LABEL_LOSSES: dict[str, Callable] = {"ce": ground_truth.cross_entropy, "bce": ground_truth.binary_cross_entropy}
# builder(**options) -> hints.Hint
HINTS: dict[str, Callable[..., hints.Hint]] = {
    "fitnet": hints.fitnet,
    "cc": hints.cc,
    "rkd": hints.rkd,
    "crd": hints.crd,
    "review": hints.review,
    "ofa": ofa.hint,
}


def pick(table: Mapping[str, Callable], name: str) -> Callable:
    """The entry `name` of one of the tables here; a ValueError names the nearest one and lists all."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown loss {name!r}: {hint}there are {', '.join(table)}")
    return table[name]
