"""Distillation that treats the true class apart or weighs the examples by it: NKD, WSLD, USKD.

The signature is that of `logits`: (student, teacher, labels) with logits (B, C) and labels int (B,) or distributions
(B, C); values are (B,). `uskd` has no teacher and relates the examples of the batch, so it is a scalar.
"""

import jax
import jax.numpy as jnp

from research.distill import ground_truth
from research.distill.logits import decoupled, kd, pair
from research.distill.numerics import expected, wide


def _target(loss: str, labels: jax.Array | None, num_classes: int) -> jax.Array:
    if labels is None:
        raise ValueError(f"{loss} needs the labels: it treats the true class apart")
    return jax.nn.one_hot(ground_truth.hard(labels), num_classes, dtype=bool)


def nkd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    gamma: float | jax.Array = 1.5,
) -> jax.Array:
    """-p_y log s_y - gamma T^2 sum_{c != y} q_c log r_c, (B,). Yang et al. 2023.

    p, s are the teacher's and the student's softmax at T = 1; q, r those over the classes other than y at T. Soft
    labels stand for their largest class. The published runs add the labels' cross-entropy with weight 1.

    Raises:
      ValueError: no labels.
    """
    target = _target("nkd", labels, student.shape[-1])
    own = [decoupled(z, target)[0][:, 0] for z in pair(student, teacher)]
    others_s, others_t = (decoupled(z, target)[1] for z in pair(student, teacher, temperature))
    rest = expected(jnp.where(target, 0, jnp.exp(others_t)), -others_s)
    return expected(jnp.exp(own[1])[:, None], -own[0][:, None]) + gamma * temperature**2 * rest


def wsld_weight(student: jax.Array, teacher: jax.Array, labels: jax.Array, *, eps: float = 1e-7) -> jax.Array:
    """w = 1 - exp(-CE(s, y) / (CE(t, y) + eps)), (B,), a constant: small where the student beats the teacher."""
    losses = [ground_truth.cross_entropy(jax.lax.stop_gradient(z), labels) for z in (student, teacher)]
    # A sum of rounded terms may fall below zero by a hair.
    student_loss, teacher_loss = wide(*(jnp.maximum(x, 0) for x in losses))
    return -jnp.expm1(-student_loss / (teacher_loss + eps))


def wsld(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 2.0,
    alpha: float | jax.Array = 2.5,
) -> jax.Array:
    """alpha T^2 w (-sum_c softmax(t/T)_c log softmax(s/T)_c), (B,), with `wsld_weight`. Zhou et al. 2021.

    Defaults are those of ImageNet; CIFAR-100 has T 4 and alpha 2.25. The published runs add the labels' cross-entropy
    with weight 1.

    Raises:
      ValueError: no labels.
    """
    if labels is None:
        raise ValueError("wsld needs the labels: they weigh the examples")
    soft = kd(student, teacher, temperature=temperature, entropy=False)
    return alpha * wsld_weight(student, teacher, labels) * soft


def _strongest(labels: jax.Array, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """The label classes (B, k) and their values: the label itself, or the two largest entries of a distribution."""
    if labels.ndim == 1:
        return labels[:, None], jnp.ones((labels.shape[0], 1))
    values, classes = jax.lax.top_k(labels, min(2, num_classes))
    return classes, values


def uskd(
    logits: jax.Array,
    weak_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float | jax.Array = 1.0,
    beta: float | jax.Array = 0.1,
    mu: float | jax.Array = 0.005,
) -> jax.Array:
    """Universal self-knowledge distillation, a scalar: alpha target + beta non-target + mu weak. Yang et al. 2023.

    Target: the labels' classes with the weights s_y^2 + y - mean_batch(s_y^2), a constant, so the value depends on the
    batch. Non-target: cross-entropy of the softmax over the other classes with Zipf's law 1/rank, ranked by the sum of
    the weak head's softmax and, as in the official code, the *log* softmax of the student, each over its mass outside
    the labels. Weak: cross-entropy of the weak head with labels smoothed by 0.1.

    Args:
      logits: (B, C).
      weak_logits: (B, C) of a linear head on a middle feature, trained by the third term only.
      labels: int (B,) or distributions (B, C), of which the two largest entries count as labels.
    """
    logits, weak_logits = wide(logits, weak_logits)
    num_classes = logits.shape[-1]
    classes, values = _strongest(labels, num_classes)
    values = values.astype(logits.dtype)
    target = jnp.any(jax.nn.one_hot(classes, num_classes, dtype=bool), axis=1)
    at_labels = lambda x: jnp.take_along_axis(x, classes, axis=1)

    log_s = jax.nn.log_softmax(logits)
    square = jnp.exp(2 * at_labels(log_s))
    weight = jnp.where(values == 0, 0, square + values - jnp.mean(square, axis=0, keepdims=True))
    target_part = -jnp.mean(jnp.sum(jax.lax.stop_gradient(weight) * at_labels(log_s), axis=-1))

    smooth = ground_truth.targets(labels, num_classes, dtype=logits.dtype).astype(logits.dtype)
    weak_part = jnp.mean(ground_truth.cross_entropy(weak_logits, smooth * 0.9 + 0.1 / num_classes))

    def over_outside(x):
        return x / (1 - jnp.sum(at_labels(x), axis=1, keepdims=True) + 1e-6)

    score = jax.lax.stop_gradient(over_outside(jax.nn.softmax(weak_logits)) + over_outside(log_s))
    rank = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
    zipf = jnp.where(target, 0, 1 / (1 + rank).astype(logits.dtype))
    zipf = zipf / jnp.maximum(jnp.sum(zipf, axis=-1, keepdims=True), jnp.finfo(zipf.dtype).tiny)
    # With two classes a distribution names both: none is left.
    others = decoupled(logits, target)[1] if classes.shape[1] < num_classes else jnp.zeros_like(logits)
    non_target = -jnp.mean(expected(zipf, others))
    return alpha * target_part + beta * non_target + mu * weak_part
