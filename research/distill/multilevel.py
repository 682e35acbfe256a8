"""Multi-level logit distillation (MLLD): examples, classes and batch at several temperatures. Jin et al. 2023.

The class and batch terms relate the examples that they are given, so all functions return scalars;
`research.core.scope.by_group` chooses the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.distill import ground_truth
from research.distill.logits import kd, pair
from research.distill.numerics import gram, wide
from research.distill.standardized import standardize

TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)


def class_correlation(student: jax.Array, teacher: jax.Array, *, temperature: float = 4.0) -> jax.Array:
    """sum (P_s' P_s - P_t' P_t)^2 / C of the probabilities P (B, C) at T, a scalar without T^2."""
    s, t = (jax.nn.softmax(z).T for z in pair(student, teacher, temperature))
    return jnp.sum(jnp.square(gram(s, s) - gram(t, t))) / student.shape[-1]


def batch_correlation(student: jax.Array, teacher: jax.Array, *, temperature: float = 4.0) -> jax.Array:
    """sum (P_s P_s' - P_t P_t')^2 / B of the probabilities P (B, C) at T, a scalar without T^2."""
    s, t = (jax.nn.softmax(z) for z in pair(student, teacher, temperature))
    return jnp.sum(jnp.square(gram(s, s) - gram(t, t))) / student.shape[0]


def multilevel(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperatures: tuple[float, ...] = TEMPERATURES,
    class_weight: float | jax.Array = 1.0,
    batch_weight: float | jax.Array = 1.0,
    standardized: bool = False,
) -> jax.Array:
    """Sum over temperatures of mean `kd` + class and batch correlations, a scalar: the paper's loss of one view.

    `standardized` standardises the logits of the divergence, and of nothing else, as the LSKD authors do.
    """
    total = 0.0
    for temperature in temperatures:
        z = tuple(map(standardize, (student, teacher))) if standardized else (student, teacher)
        total += jnp.mean(kd(*z, temperature=temperature))
        total += class_weight * class_correlation(student, teacher, temperature=temperature)
        total += batch_weight * batch_correlation(student, teacher, temperature=temperature)
    return total


class Views(NamedTuple):
    """Logits (B, C) of the weakly (crop and flip) and the strongly (RandAugment) augmented view of the same images."""

    weak: jax.Array
    strong: jax.Array


class Parts(NamedTuple):
    """The weighted terms of `mlld`; the loss is their sum."""

    ce: jax.Array
    kd: jax.Array
    classes: jax.Array
    batch: jax.Array


def _unsure(confidence: jax.Array) -> jax.Array:
    """The share of entries not above their median (interpolated)."""
    return jnp.mean((confidence <= jnp.median(confidence)).astype(confidence.dtype))


def mlld(
    student: Views,
    teacher: Views,
    labels: jax.Array,
    *,
    temperature: float = 4.0,
    ce_weight: float | jax.Array = 0.1,
    kd_weight: float | jax.Array = 0.9,
    standardized: bool = False,
) -> Parts:
    """The two-view loss of the official code, scalars, at T and 3, 5, 2, 6.

    It differs from the paper in what the code does: the terms of the weak view are means over all examples, multiplied
    by the share of examples (of classes, for the class term) that the teacher is unsure of instead of being masked; the
    strong view's divergence takes the weak logits at temperatures 2 and 6; the strong view has no correlations.
    The published runs last 480 epochs with learning rate 0.025.
    """
    weak_t, strong_t = wide(*teacher)
    probability = jax.lax.stop_gradient(jax.nn.softmax(weak_t))
    unsure, unsure_classes = _unsure(jnp.max(probability, axis=-1)), _unsure(jnp.sum(probability, axis=0))
    stand = standardize if standardized else lambda z: z

    def divergence(s, t, temperatures):
        return sum(jnp.mean(kd(stand(s), stand(t), temperature=value)) for value in temperatures)

    temperatures = (temperature, *TEMPERATURES[1:])
    weak = divergence(student.weak, weak_t, temperatures)
    strong = divergence(student.strong, strong_t, temperatures[:3]) + divergence(student.weak, weak_t, temperatures[3:])
    classes, batch = (
        sum(f(student.weak, weak_t, temperature=value) for value in temperatures)
        for f in (class_correlation, batch_correlation)
    )
    hard = sum(jnp.mean(ground_truth.cross_entropy(z, labels)) for z in student)
    return Parts(
        ce_weight * hard,
        kd_weight * (weak * unsure + strong),
        kd_weight * classes * unsure_classes,
        kd_weight * batch * unsure,
    )
