"""Logit standardisation: distillation of z-scores instead of logits. Sun et al. 2024, "Logit Standardization in KD".

A student then need not match the range and the spread of its teacher's logits. Signatures are those of `logits`.
"""

import math

import jax
import jax.numpy as jnp

from research.distill.logits import dkd, kd, kd_and_labels
from research.distill.numerics import norm, wide


def standardize(logits: jax.Array, *, eps: float = 1e-7) -> jax.Array:
    """(z - mean) / (eps + std) over the last axis, where std is the N - 1 estimate; at least float32.

    Gradients flow through mean and std. Equal logits become zeros, with a gradient of order 1/eps.
    """
    (logits,) = wide(logits)
    centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
    return centred / (eps + norm(centred, keepdims=True) / math.sqrt(max(logits.shape[-1] - 1, 1)))


def lskd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 2.0,
    eps: float = 1e-7,
) -> jax.Array:
    """`kd` of standardised logits, (B,), with its T^2. The published runs weigh it by 9 beside 0.1 cross-entropy."""
    return kd(standardize(student, eps=eps), standardize(teacher, eps=eps), temperature=temperature)


def lskd_dkd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 2.0,
    alpha: float | jax.Array = 1.0,
    beta: float | jax.Array = 8.0,
    eps: float = 1e-7,
) -> jax.Array:
    """`dkd` of standardised logits, (B,). The published runs multiply alpha and beta by 9, as they do `lskd`."""
    z = standardize(student, eps=eps), standardize(teacher, eps=eps)
    return dkd(*z, labels, temperature=temperature, alpha=alpha, beta=beta)


def lskd_and_labels(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 2.0,
    alpha: float | None = 0.1,
    beta: float | None = None,
    eps: float = 1e-7,
) -> jax.Array:
    """torchdistill's LogitStdKDLoss, (B,): alpha CE(s, y) + beta T^2 KL of standardised logits; see `kd_and_labels`."""
    z = standardize(student, eps=eps), standardize(teacher, eps=eps)
    return kd_and_labels(*z, labels, temperature=temperature, alpha=alpha, beta=beta, label_logits=student)
