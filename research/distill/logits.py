"""Distillation from the teacher's logits.

All functions have the signature `loss(student, teacher, labels=None, **options)` with logits (B, C) of any float dtype,
labels int (B,) or distributions (B, C), and the teacher taken as a constant. They return one value an example, (B,), to
be averaged by the caller; `dist`, which relates the examples to each other, returns a scalar. Defaults are those of the
VanillaKD runs on ImageNet.
"""

import jax
import jax.numpy as jnp
import optax

from research.distill import ground_truth
from research.distill.numerics import at_least_two, expected, norm, wide


def pair(student: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> list[jax.Array]:
    """Both logits over the temperature in the dtype to compute in, the teacher's as constants."""
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    return [student / temperature, teacher / temperature]


def kd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    square: bool = True,
    entropy: bool = True,
    mean_classes: bool = False,
) -> jax.Array:
    """T^2 KL(softmax(t/T) || softmax(s/T)), (B,). Hinton et al. 2015; CIFAR protocols use T = 4.

    The mean over the batch is the `batchmean` of mdistiller and vanillaKD. The options give the other conventions:

    Args:
      square: multiply by T^2, which keeps the size of the gradient as T grows.
      entropy: subtract the teacher's entropy; False leaves the soft cross-entropy (cls_KD), with the same gradient.
      mean_classes: divide by C as well (DeiT's soft distillation averages over all elements).
    """
    s, t = pair(student, teacher, temperature)
    log_s, log_t = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
    value = expected(jnp.exp(log_t), log_t - log_s if entropy else -log_s)
    value = value * temperature**2 if square else value
    return value / student.shape[-1] if mean_classes else value


def hard(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """Cross-entropy with the teacher's most likely class, (B,): hard distillation of DeiT, Touvron et al. 2021."""
    return ground_truth.cross_entropy(student, jnp.argmax(teacher, axis=-1))


def kd_and_labels(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | None = 0.5,
    beta: float | None = None,
    label_logits: jax.Array | None = None,
) -> jax.Array:
    """torchdistill's loss alpha CE + beta T^2 KL, (B,), with beta = 1 - alpha unless given.

    Without labels, or with `alpha` None or 0, torchdistill returns the bare divergence, with neither T^2 nor beta.
    `label_logits` are what the labels are asked of, where that is not `student`.
    """
    if labels is None or not alpha:
        return kd(student, teacher, temperature=temperature, square=False)
    beta = 1 - alpha if beta is None else beta
    hard_loss = ground_truth.cross_entropy(student if label_logits is None else label_logits, labels)
    return alpha * hard_loss + beta * kd(student, teacher, temperature=temperature)


def bkd(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """Mean over classes of the binary cross-entropy of sigmoid(s) with softmax(t), (B,): `bkd` of VanillaKD."""
    s, t = pair(student, teacher)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(s, jax.nn.softmax(t)), axis=-1)


def decoupled(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log (p_y, 1 - p_y) as (B, 2), and log softmax over the classes other than y as (B, C), 0 at y.

    `logits` (B, C) in the dtype to compute in, `target` (B, C) bool, true at y. log(1 - p_y) is a logsumexp over the
    other classes, so it is exact where p_y rounds to 1.
    """
    whole = jax.nn.logsumexp(logits, axis=-1)
    rest = jax.nn.logsumexp(jnp.where(target, -jnp.inf, logits), axis=-1)
    own = jnp.sum(jnp.where(target, logits, 0), axis=-1)
    others = jnp.where(target, 0, logits - rest[:, None])
    return jnp.stack([own - whole, rest - whole], axis=-1), others


def dkd_parts(
    student: jax.Array, teacher: jax.Array, labels: jax.Array, *, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """The target-class and non-target-class divergences of DKD, (B,) each, both times T^2.

    Two classes have no distribution among the others and a second part of 0.
    """
    target = jax.nn.one_hot(ground_truth.hard(labels), student.shape[-1], dtype=bool)
    s, t = pair(student, teacher, temperature)
    (binary_s, others_s), (binary_t, others_t) = decoupled(s, target), decoupled(t, target)
    target_part = expected(jnp.exp(binary_t), binary_t - binary_s)
    other_part = expected(jnp.where(target, 0, jnp.exp(others_t)), others_t - others_s)
    return target_part * temperature**2, other_part * temperature**2


def dkd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | jax.Array = 1.0,
    beta: float | jax.Array = 2.0,
) -> jax.Array:
    """Decoupled distillation, (B,): alpha KL(b_t || b_s) T^2 + beta KL(q_t || q_s) T^2. Zhao et al. 2022, eq. 7.

    b = (p_y, 1 - p_y), q = softmax over the classes other than y. Soft labels stand for their largest class. `alpha`
    and `beta` are scalars or (B,). mdistiller multiplies the loss by `numerics.warmup(epoch, 20)`, vanillaKD by
    nothing.

    Raises:
      ValueError: no labels.
    """
    if labels is None:
        raise ValueError("dkd needs the labels: it treats the true class apart")
    target_part, other_part = dkd_parts(student, teacher, labels, temperature=temperature)
    return alpha * target_part + beta * other_part


def pearson(a: jax.Array, b: jax.Array, axis: int, eps: float, clamp: bool = False) -> jax.Array:
    """Pearson correlation along `axis`, with `eps` added to the product of the norms.

    With `clamp` each norm is at least `eps` instead, as in PyTorch's cosine_similarity.
    """
    a, b = (x - jnp.mean(x, axis=axis, keepdims=True) for x in (a, b))
    lengths = norm(a, axis), norm(b, axis)
    size = jnp.maximum(lengths[0], eps) * jnp.maximum(lengths[1], eps) if clamp else lengths[0] * lengths[1] + eps
    return jnp.sum(a * b, axis=axis) / size


def dist(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-8,
    clamp: bool = False,
) -> jax.Array:
    """T^2 [beta (1 - mean_b rho(P_s[b], P_t[b])) + gamma (1 - mean_c rho(P_s[:, c], P_t[:, c]))], a scalar.

    P = softmax(z/T), rho = Pearson correlation, with `eps` added to the product of the norms or, as in torchdistill,
    each norm clamped at it. Logits (..., C): leading axes are rows alike, so segmentation maps (B, H, W, C) correlate
    over all pixels. The second term depends on the rows it is given (256 in the published runs). Where all of a row's
    student logits are equal, as of a zero-initialised head, its correlation has no direction and a gradient of order
    1/eps: clip the gradient, or warm up. Huang et al. 2022, eq. 7-10.

    Raises:
      ValueError: a single row.
    """
    classes = student.shape[-1]
    s, t = (jax.nn.softmax(z.reshape(-1, classes)) for z in pair(student, teacher, temperature))
    at_least_two("dist", s.shape[0])
    within_rows, within_columns = (1 - jnp.mean(pearson(s, t, axis, eps, clamp)) for axis in (1, 0))
    return temperature**2 * (beta * within_rows + gamma * within_columns)
