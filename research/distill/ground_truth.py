"""What the labels ask of the logits: cross-entropy and binary cross-entropy against hard, smoothed or mixed targets.

Losses take logits (B, C) and labels, int (B,) or distributions (B, C), and return one value an example, (B,).
"""

import jax
import jax.numpy as jnp
import optax

from research.distill.numerics import expected, wide


def targets(labels: jax.Array, num_classes: int, smoothing: float = 0.0, dtype=jnp.float32) -> jax.Array:
    """Labels as distributions (B, C): int labels become one-hot, smoothed to 1 - eps + eps/C and eps/C (timm).

    Raises:
      ValueError: the labels do not fit `num_classes`, or `smoothing` is asked of labels that are distributions already.
    """
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=dtype) * (1.0 - smoothing) + smoothing / num_classes
    if labels.ndim != 2 or labels.shape[-1] != num_classes:
        raise ValueError(f"labels of shape {labels.shape}: {num_classes} classes take (B,) or (B, {num_classes})")
    if smoothing:
        raise ValueError(f"{smoothing=} of labels that are soft targets already: smooth them where they are mixed")
    return labels


def hard(labels: jax.Array) -> jax.Array:
    """Class indices (B,) of labels: soft targets (B, C) give their largest class, the first of equals."""
    return labels if labels.ndim == 1 else jnp.argmax(labels, axis=-1)


def _pair(logits: jax.Array, labels: jax.Array, smoothing: float) -> list[jax.Array]:
    (logits,) = wide(logits)
    return wide(logits, targets(labels, logits.shape[-1], smoothing, logits.dtype))


def cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """-sum_c y_c log softmax(z)_c, (B,): cross-entropy, soft-target and label-smoothing cross-entropy in one."""
    logits, target = _pair(logits, labels, smoothing)
    return -expected(target, jax.nn.log_softmax(logits))


def binary_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    smoothing: float = 0.0,
    sum_classes: bool = False,
    threshold: float | None = None,
) -> jax.Array:
    """Binary cross-entropy of every class against its target, (B,).

    Args:
      sum_classes: sum over classes instead of their mean. The mean (timm 0.6, and the published A1/A2 runs) makes this
        term about C times weaker beside a divergence, which is summed over classes.
      threshold: targets above it become 1 and the others 0, None keeps them soft.
    """
    logits, target = _pair(logits, labels, smoothing)
    if threshold is not None:
        target = (target > threshold).astype(target.dtype)
    values = optax.sigmoid_binary_cross_entropy(logits, target)
    return jnp.sum(values, axis=-1) if sum_classes else jnp.mean(values, axis=-1)
