"""Distillation of how the examples of a batch relate to each other, seen in one vector an example.

All functions take student (B, c) and teacher (B, d) features and return a scalar. They see exactly the batch they are
given: `research.core.scope.by_group` chooses it.
"""

import math

import jax
import jax.numpy as jnp
import optax

from research.distill.numerics import at_least_two, gram, norm, unit, wide

# Anchors whose B x d differences are held at a time.
_ANCHORS = 16


def cc(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None, *, scale: float = 0.02) -> jax.Array:
    """scale * mean_i sum_d |e_i| |e_{i+1}|, e = student - teacher, over consecutive examples.

    The form of RepDistiller and vanillaKD of Correlation Congruence (Peng et al. 2019); it depends on the order of the
    examples. Both arguments are trained embeddings of one width, so the teacher's is not taken as a constant.
    """
    at_least_two("cc", student.shape[0])
    student, teacher = wide(student, teacher)
    delta = jnp.abs(student - teacher)
    return scale * jnp.mean(jnp.sum(delta[:-1] * delta[1:], axis=-1))


def cc_kernel(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
) -> jax.Array:
    """||K(student) - K(teacher)||_F / B^2, the kernel form of Correlation Congruence (Peng et al. 2019, eq. 5-7).

    K is the Gram matrix ("bilinear") or the Taylor series of a Gaussian kernel of unit vectors ("gaussian"),
    exp(-2 gamma) sum_{p <= order} (2 gamma)^p / p! <x, y>^p; as in torchdistill the norm is not squared.
    """
    if kernel not in ("gaussian", "bilinear"):
        raise ValueError(f"kernel={kernel!r}: choose 'gaussian' or 'bilinear'")

    def kernel_matrix(x):
        products = gram(x, x)
        if kernel == "bilinear":
            return products
        terms = [(2 * gamma) ** p / math.factorial(p) * products**p for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(terms)

    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    return norm(kernel_matrix(student) - kernel_matrix(teacher), axis=None) / student.shape[0] ** 2


def sp(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """||G_t - G_s||_F^2 / B^2, G the Gram matrix with its rows at unit length. Tung & Mori 2019.

    Features (B, ...) are flattened; the published runs give the last feature map weight 3000.
    """
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    s, t = (unit(gram(x, x)) for x in (x.reshape(x.shape[0], -1) for x in (student, teacher)))
    return jnp.mean(jnp.square(t - s))


def pkt(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None, *, eps: float = 1e-7) -> jax.Array:
    """mean_ij p_t log((p_t + eps) / (p_s + eps)), p the cosines mapped to [0, 1] with rows that sum to 1.

    The mean is over all B^2 entries, as in mdistiller and RepDistiller, hence their weight of 30000. Passalis & Tefas
    2018.
    """
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))

    def affinity(x):
        x = x / (norm(x, keepdims=True) + eps)
        similarity = (gram(x, x) + 1) / 2
        return similarity / jnp.sum(similarity, axis=1, keepdims=True)

    s, t = affinity(student), affinity(teacher)
    return jnp.mean(t * jnp.log((t + eps) / (s + eps)))


def simple_recipe(
    student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None, *, exponent: float | jax.Array = 4.0
) -> jax.Array:
    """log sum |student - teacher|^exponent over the whole batch, a scalar: the feature term of SRD.

    Miles & Mikolajczyk 2024. torchdistill adds twice this to a mean `kd` without T^2. A perfect match is the logarithm
    of the smallest float instead of minus infinity, with zero gradient.
    """
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    difference = jnp.abs(student - teacher)
    apart = difference > 0
    total = jnp.sum(jnp.where(apart, jnp.where(apart, difference, 1) ** exponent, 0))
    return jnp.log(jnp.maximum(total, jnp.finfo(total.dtype).tiny))


def _distances(x: jax.Array, squared: bool, eps: float) -> jax.Array:
    """Distances (B, B) over their mean off the diagonal, which is 0; squares are clamped at `eps`."""
    # Shifting all rows changes no distance, and keeps the digits of |x|^2 + |y|^2 - 2 <x, y>.
    x = x - jax.lax.stop_gradient(jnp.mean(x, axis=0, keepdims=True))
    rows, size = jnp.sum(jnp.square(x), axis=-1), x.shape[0]
    distance = jnp.maximum(rows[:, None] + rows[None, :] - 2 * gram(x, x), eps)
    distance = distance if squared else jnp.sqrt(distance)
    distance = jnp.where(jnp.eye(size, dtype=bool), 0, distance)
    # Clamped at eps > 0, all entries off the diagonal count as positive.
    return distance / (jnp.sum(distance) / (size * (size - 1)))


def rkd_distance(student: jax.Array, teacher: jax.Array, *, squared: bool = False, eps: float = 1e-12) -> jax.Array:
    """Mean over pairs (i, j) of smooth-L1 between the normalised distances. Park et al. 2019, eq. 5-7."""
    at_least_two("rkd", student.shape[0])
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    return jnp.mean(optax.huber_loss(_distances(student, squared, eps), _distances(teacher, squared, eps)))


def rkd_angle(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean over triplets (i, j, k) of smooth-L1 between the cosines at i of the angle j i k. Park et al. 2019, eq. 8-9.

    Degenerate triplets have cosine 0. The B x B x d differences are never held at once: anchors go in small batches and
    are computed again for the gradient.
    """
    at_least_two("rkd", student.shape[0])
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))

    def cosines(x, anchor):
        direction = unit(anchor[None, :] - x, eps=1e-12)
        return gram(direction, direction)

    @jax.checkpoint
    def at(anchors):
        return jnp.mean(optax.huber_loss(cosines(student, anchors[0]), cosines(teacher, anchors[1])))

    return jnp.mean(jax.lax.map(at, (student, teacher), batch_size=_ANCHORS))


def rkd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    eps: float = 1e-12,
) -> jax.Array:
    """Relational distillation, 25 x distances + 50 x angles as in RepDistiller. Park et al. 2019."""
    distance = rkd_distance(student, teacher, squared=squared, eps=eps)
    return distance_weight * distance + angle_weight * rkd_angle(student, teacher)
