"""Distillation from several teachers, and of whole functions: MEAL V2 and FunMatch.

Teacher logits are (B, C), or (K, B, C) of K teachers that saw the same images; they are constants.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from research.core import scope
from research.data import mixup
from research.distill.features import TORCH_INIT
from research.distill.logits import kd
from research.distill.numerics import expected, wide

DISTANCES = ("kl", "l2", "euclidean", "logsoftmax_euclidean", "hard")


def _stacked(teacher: jax.Array) -> jax.Array:
    return teacher if teacher.ndim == 3 else teacher[None]


def soft_label(teacher: jax.Array) -> jax.Array:
    """Mean of the teachers' softmax, (B, C)."""
    (teacher,) = wide(jax.lax.stop_gradient(_stacked(teacher)))
    return jnp.mean(jax.nn.softmax(teacher), axis=0)


def meal(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """-sum_c p_c log softmax(s)_c with the teachers' `soft_label`, (B,). Shen & Savvides 2020 (MEAL V2).

    No temperature, no labels. The published runs start from a student pretrained on ImageNet and add the loss of a
    `Discriminator`.
    """
    (student,) = wide(student)
    return expected(soft_label(teacher).astype(student.dtype), -jax.nn.log_softmax(student))


class Discriminator(nn.Module):
    """MEAL V2's judge of whether logits (B, C) are the student's or the teachers', (B, 2): C, C/K, C/K^2, 2.

    ReLU follows all three layers, the last one too.
    """

    reduction: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, logits: jax.Array) -> jax.Array:
        width, x = logits.shape[-1], logits
        widths = (width // self.reduction, width // self.reduction // self.reduction, 2)
        if not widths[1]:
            raise ValueError(f"Discriminator: {width} classes divided by {self.reduction} twice leave no unit")
        for index, width in enumerate(widths, 1):
            x = nn.relu(nn.Dense(width, kernel_init=TORCH_INIT, dtype=self.dtype, name=f"conv{index}")(x))
        return x


def discriminate(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean binary cross-entropy of the judgements (B, 2) with (1, 0) and (0, 1), (B,): both networks minimise it.

    As in the official code the student is not set against the discriminator: its gradient is not reversed.
    """
    student, teacher = wide(student, teacher)
    losses = [
        optax.sigmoid_binary_cross_entropy(x, jnp.asarray(side, x.dtype)[None, :])
        for x, side in ((student, (1, 0)), (teacher, (0, 1)))
    ]
    return jnp.mean(jnp.concatenate(losses, axis=-1), axis=-1)


def _entropy_clip(student: jax.Array, teacher: jax.Array, temperature: float, clip: float) -> jax.Array:
    """What clipping probabilities at `clip` inside the entropy's logarithm adds to the divergence."""
    log_t = jax.nn.log_softmax(teacher / temperature)
    return temperature**2 * expected(jnp.exp(log_t), jnp.maximum(jnp.log(clip) - log_t, 0).astype(log_t.dtype))


def distance(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    kind: str = "kl",
    temperature: float | jax.Array = 1.0,
    smoothing: float = 0.0,
    eps: float = 1e-12,
    clip: float = 1e-8,
) -> jax.Array:
    """big_vision's distances between the outputs of two networks, (B,).

    "kl" is T^2 KL(t || s), where the entropy's logarithm is clipped at `clip`; "l2" the sum of squared differences;
    "euclidean" the root of that plus `eps`; "logsoftmax_euclidean" the same of log softmax; "hard" the divergence from
    the teacher's class, smoothed so that the other classes share `smoothing`.

    Raises:
      ValueError: another kind.
    """
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    if kind == "kl":
        return kd(student, teacher, temperature=temperature) + _entropy_clip(student, teacher, temperature, clip)
    if kind == "hard":
        classes = teacher.shape[-1]
        target = jax.nn.one_hot(jnp.argmax(teacher, axis=-1), classes, dtype=student.dtype)
        target = target * (1 - smoothing) + (1 - target) * smoothing / (classes - 1)
        return expected(target, jnp.log(jnp.maximum(target, clip)) - jax.nn.log_softmax(student))
    if kind == "logsoftmax_euclidean":
        student, teacher = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    elif kind not in DISTANCES:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(DISTANCES)}")
    square = jnp.sum(jnp.square(student - teacher), axis=-1)
    return square if kind == "l2" else jnp.sqrt(square + eps)


def funmatch(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    kind: str = "kl",
    temperature: float | jax.Array = 1.0,
    smoothing: float = 0.0,
) -> jax.Array:
    """Sum of `distance` over the teachers, (B,), without labels. Beyer et al. 2022, "A good teacher is patient ...".

    Consistent teaching: student and teachers see the same crop and the same `consistent_mixup`; patient: 1200 epochs.
    """
    options = {"kind": kind, "temperature": temperature, "smoothing": smoothing}
    return sum(distance(student, one, **options) for one in _stacked(teacher))


def agreement(student: jax.Array, teacher: jax.Array, *, top: int = 1) -> jax.Array:
    """Whether the teacher's class is among the student's `top` classes, (B,) int32."""
    own = jax.lax.top_k(student, top)[1]
    return jnp.sum(own == jnp.argmax(teacher, axis=-1)[:, None], axis=-1, dtype=jnp.int32)


def consistent_mixup(images: jax.Array, amount: jax.Array | float) -> jax.Array:
    """a x + (1 - a) roll(x, 1), a = max(amount, 1 - amount), over the whole batch: FunMatch's mixup.

    `images` (B, ...), also of labels; the same mixed images go to the teacher and to the student. `amount` is drawn
    from U(0, 1) for mixup of p = 1.
    """
    amount = jnp.maximum(amount, 1 - amount)
    partners = scope.local(jnp.roll(scope.gather(images), 1, axis=0))
    return mixup.mixup(images, amount, partners)
