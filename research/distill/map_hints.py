"""Hint methods on feature maps and their relations that train nothing of their own: AT, NST, FSP, KD-SVD, SP, PKT.

Builders as in `hints`: options in, a `Hint` out. Endpoint names are None for all stages, or the last for methods of one
map. Losses are unweighted; the published weights are in the README.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.core import scope
from research.distill import manifold as manifold_lib
from research.distill import maps, relations, taps
from research.distill.hints import Hint
from research.distill.numerics import until

Names = tuple[str, ...] | None


def _plain(loss: Callable) -> Hint:
    """A Hint without parameters or state of a scalar loss (student, teacher, key, epoch)."""

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        return loss(student, teacher, key, epoch), state

    return Hint(lambda key, student, teacher: ({}, {}), apply)


def _by_stage(function: Callable, student: Names, teacher: Names) -> Hint:
    """The sum over stages of a per-example loss of one."""

    def loss(own, known, key, epoch):
        return sum(jnp.mean(function(s, t)) for s, t in taps.pairs(own, known, (student, teacher)))

    return _plain(loss)


def at(*, student: Names = None, teacher: Names = None, power: int = 2) -> Hint:
    """Attention transfer, as everyone's code has it: `maps.at`."""
    return _by_stage(lambda s, t: maps.at(s, t, power=power), student, teacher)


def at_paper(*, student: Names = None, teacher: Names = None) -> Hint:
    """Attention transfer, as in the paper: `maps.at_paper`."""
    return _by_stage(maps.at_paper, student, teacher)


def nst(*, student: Names = None, teacher: Names = None) -> Hint:
    """Neuron selectivity transfer: `maps.nst`."""
    return _by_stage(maps.nst, student, teacher)


def fsp(*, student: Names = None, teacher: Names = None, init_epochs: float | None = None) -> Hint:
    """Flow of the solution procedure: `maps.fsp`, between networks of equal widths.

    Args:
      init_epochs: epochs in which it acts; RepDistiller trains with it alone before the labels. None is always.
    """

    def loss(own, known, key, epoch):
        own, known = map(list, zip(*taps.pairs(own, known, (student, teacher)), strict=True))
        value = jnp.mean(maps.fsp(own, known))
        return value * until(epoch, init_epochs).astype(value.dtype)

    return _plain(loss)


def kdsvd(*, student: Names = None, teacher: Names = None, count: int = 1) -> Hint:
    """Singular vectors of neighbouring stages: `manifold.kdsvd`, between networks of equal widths."""

    def loss(own, known, key, epoch):
        own, known = map(list, zip(*taps.pairs(own, known, (student, teacher)), strict=True))
        return jnp.mean(manifold_lib.kdsvd(own, known, count=count))

    return _plain(loss)


def sp(*, student: str | None = None, teacher: str | None = None, group: int | None = None) -> Hint:
    """Similarity preserving on the last map, over groups of `group` examples (None: the batch)."""

    def loss(own, known, key, epoch):
        return scope.by_group(relations.sp, group, taps.last_stage(own, student), taps.last_stage(known, teacher))

    return _plain(loss)


def pkt(*, student: str = "pooled", teacher: str = "pooled", eps: float = 1e-7, group: int | None = None) -> Hint:
    """Probabilistic knowledge transfer, over groups of `group` examples (None: the batch)."""

    def loss(own, known, key, epoch):
        flat = [x.reshape(x.shape[0], -1) for x in (taps.tap(own, student), taps.tap(known, teacher))]
        return scope.by_group(lambda s, t: relations.pkt(s, t, eps=eps), group, *flat)

    return _plain(loss)


def manifold(
    *,
    student: Names = None,
    teacher: Names = None,
    sample: int = 192,
    patch_weight: float = 4.0,
    sample_weight: float = 0.1,
    random_weight: float = 0.2,
    group: int | None = None,
) -> Hint:
    """ManifoldKD: the mean over layers of `manifold.manifold`, over groups of `group` examples (None: the batch).

    Args:
      student, teacher: endpoints of tokens; None takes the first four blocks and the last four, as DeiT-T of CaiT-S24.
      sample: tokens drawn for the third term, anew for every layer.
    Raises:
      ValueError: at apply, no key, or unequal numbers of layers.
    """
    weights = {"patch_weight": patch_weight, "sample_weight": sample_weight, "random_weight": random_weight}

    def ends(found):
        return found if len(found) <= 8 else found[:4] + found[-4:]

    def loss(own, known, key, epoch):
        if key is None:
            raise ValueError("manifold needs a random key: it draws tokens")
        layers = [
            [taps.tap(endpoints, name) for name in taps.blocks(endpoints, names, ends)]
            for endpoints, names in ((own, student), (known, teacher))
        ]
        if len(layers[0]) != len(layers[1]):
            raise ValueError(f"manifold: {len(layers[0])} layers of the student, {len(layers[1])} of the teacher")

        def of_batch(own, known):
            total = 0.0
            for layer, (s, t) in enumerate(zip(own, known, strict=True)):
                tokens = s.shape[0] * min(s.shape[1], t.shape[1])
                drawn = jax.random.permutation(jax.random.fold_in(key, layer), tokens)[:sample]
                total += manifold_lib.manifold(s, t, drawn, **weights)
            return total / len(own)

        return scope.by_group(of_batch, group, *layers)

    return _plain(loss)
