"""Losses by name, for configs and notebooks; each name is that of a function in the module beside it."""

import difflib
import importlib
from collections.abc import Callable, Mapping

from research.distill import (
    adaptor_hints,
    ensembles,
    gpt4image,
    ground_truth,
    hints,
    label_aware,
    logit_hints,
    logits,
    map_hints,
    masked_hints,
    multilevel,
    ofa,
    sequence,
    standardized,
)

# loss(student, teacher, labels=None, **options) -> (B,), or a scalar where it relates the examples to each other.
LOSSES: dict[str, Callable] = {
    "kd": logits.kd,
    "hard": logits.hard,
    "kd_and_labels": logits.kd_and_labels,
    "bkd": logits.bkd,
    "dkd": logits.dkd,
    "nkd": label_aware.nkd,
    "wsld": label_aware.wsld,
    "lskd": standardized.lskd,
    "lskd_dkd": standardized.lskd_dkd,
    "lskd_and_labels": standardized.lskd_and_labels,
    "dist": logits.dist,
    "multilevel": multilevel.multilevel,
    "ofa": ofa.ofa,
    # Of one teacher (B, C) or of several (K, B, C).
    "meal": ensembles.meal,
    "funmatch": ensembles.funmatch,
    # Of language models, token by token, and of classifiers.
    "forward_kl": sequence.forward_kl,
    "reverse_kl": sequence.reverse_kl,
    "symmetric_kl": sequence.symmetric_kl,
    "js": sequence.js,
    "jsd": sequence.jsd,
    "total_variation": sequence.total_variation,
    "skewed_kl": sequence.skewed_kl,
    "skewed_reverse_kl": sequence.skewed_reverse_kl,
}
# Those of LOSSES that return a scalar: the caller chooses their batch, `research.core.scope.by_group`.
RELATIONAL = frozenset({"dist", "multilevel"})
# Those of LOSSES that tell several teachers (K, B, C) apart; the others see the mean of their probabilities.
ENSEMBLE = frozenset({"meal", "funmatch"})
# loss(student, teacher, labels, **options) -> terms of a scalar, of `multilevel.Views` of the same images; the labels'
# term is one of them, so an arm's `label_weight` is 0.
TWO_VIEWS: dict[str, Callable] = {"mlld": multilevel.mlld}
# loss(logits, labels, **options) -> (B,)
LABEL_LOSSES: dict[str, Callable] = {"ce": ground_truth.cross_entropy, "bce": ground_truth.binary_cross_entropy}
# builder(**options) -> hints.Hint
HINTS: dict[str, Callable[..., hints.Hint]] = {
    "fitnet": hints.fitnet,
    "at": map_hints.at,
    "at_paper": map_hints.at_paper,
    "nst": map_hints.nst,
    "fsp": map_hints.fsp,
    "kdsvd": map_hints.kdsvd,
    "ab": adaptor_hints.ab,
    "vid": adaptor_hints.vid,
    "ofd": adaptor_hints.ofd,
    "srrl": adaptor_hints.srrl,
    "ft": adaptor_hints.ft,
    "mgd": masked_hints.mgd,
    "vitkd": masked_hints.vitkd,
    "sp": map_hints.sp,
    "pkt": map_hints.pkt,
    "manifold": map_hints.manifold,
    "cc": hints.cc,
    "rkd": hints.rkd,
    "crd": hints.crd,
    "review": hints.review,
    "ofa": ofa.hint,
    "gpt4image": gpt4image.hint,
    "ctkd": logit_hints.ctkd,
    "uskd": logit_hints.uskd,
    "discriminator": logit_hints.discriminator,
}


def pick(table: Mapping[str, Callable], name: str) -> Callable:
    """The entry `name` of one of the tables here; a ValueError names the nearest one and lists all."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown loss {name!r}: {hint}there are {', '.join(table)}")
    return table[name]


def hint(name: str) -> Callable[..., hints.Hint]:
    """The builder `name` of HINTS; or the function `hint` of a module, by its import path, which returns the like.

    Raises:
      ValueError: neither.
    """
    if "." not in name:
        return pick(HINTS, name)
    try:
        return importlib.import_module(name).hint
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not name.startswith(error.name or "."):
            raise
        raise ValueError(f"hint: {name!r} is not the import path of a module with a function `hint`") from None
