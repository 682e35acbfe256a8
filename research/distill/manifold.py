"""Distillation of the relations between tokens, and between singular vectors: ManifoldKD, KD-SVD."""

import functools

import jax
import jax.numpy as jnp

from research.distill.numerics import gram, unit, wide


def _difference(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference of the Gram matrices of (..., n, c) and (..., n, d)."""
    return jnp.mean(jnp.square(gram(student, student) - gram(teacher, teacher)))


def manifold(
    student: jax.Array,
    teacher: jax.Array,
    sample: jax.Array,
    *,
    patch_weight: float | jax.Array = 4.0,
    sample_weight: float | jax.Array = 0.1,
    random_weight: float | jax.Array = 0.2,
) -> jax.Array:
    """ManifoldKD's loss of one pair of layers, a scalar. Hao et al. 2022.

    Mean squared differences of the Gram matrices of tokens at unit length: within every image, across the images at
    every position, and among a sample of all tokens.

    Args:
      student, teacher: (B, N, c) and (B, N, d) tokens; class and distillation tokens that come first in excess of the
        other network's are dropped.
      sample: (K,) int, positions among the B * N tokens; the published runs draw K = 192 without replacement.
    """
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    count = min(student.shape[1], teacher.shape[1])
    s, t = (unit(x[:, x.shape[1] - count :]) for x in (student, teacher))
    across = [jnp.swapaxes(x, 0, 1) for x in (s, t)]
    drawn = [x.reshape(-1, x.shape[-1])[sample] for x in (s, t)]
    terms = ((patch_weight, (s, t)), (sample_weight, across), (random_weight, drawn))
    return sum(weight * _difference(*pair) for weight, pair in terms)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def right_vectors(x: jax.Array, count: int) -> jax.Array:
    """The first `count` right singular vectors of (n, c), as (c, count), with a gradient that is finite everywhere.

    Between equal singular values the vectors are not defined; there the gradient omits the infinite part. Their signs
    are the decomposition's.
    """
    return jnp.linalg.svd(x, full_matrices=False)[2][:count].T


@right_vectors.defjvp
def _right_vectors_jvp(count, primals, tangents):
    (x,), (dx,) = primals, tangents
    _, singular, basis = jnp.linalg.svd(x, full_matrices=False)
    vectors = basis[:count].T
    value = jnp.square(singular)
    tolerance = jnp.finfo(x.dtype).eps * jnp.max(value, initial=0.0) * 10

    def inverse(gap):
        apart = jnp.abs(gap) > tolerance
        return jnp.where(apart, 1 / jnp.where(apart, gap, 1), 0)

    # First-order perturbation of the eigenvectors of x' x: within the span of all singular vectors, and outside of it.
    change = x.T @ (dx @ vectors) + dx.T @ (x @ vectors)
    inside = basis @ change
    within = basis.T @ (inside * inverse(value[None, :count] - value[:, None]))
    outside = (change - basis.T @ inside) * inverse(value[None, :count])
    return vectors, within + outside


def _pixels(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _principal(student: jax.Array, teacher: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The first right singular vectors of both (B, pixels, C) maps, (B, C, count), the student's aligned."""
    _, singular, basis = jnp.linalg.svd(teacher, full_matrices=False)
    t = jnp.swapaxes(basis[:, :count], 1, 2)
    size = unit(singular[:, :count])[:, None, :]
    # Three candidates more than the teacher's, of which each of the teacher's vectors takes the most similar.
    candidates = min(count + 3, *student.shape[1:])
    s = jax.vmap(lambda x: right_vectors(x, candidates))(student)
    cosine = jnp.einsum("bci,bcj->bij", s, t)
    strongest = jnp.abs(cosine) == jnp.max(jnp.abs(cosine), axis=1, keepdims=True)
    s = jnp.einsum("bci,bij->bcj", s, jax.lax.stop_gradient(jnp.where(strongest, jnp.sign(cosine), 0)))
    return s * size, t * size


def _similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """exp(-(a_i - b_j)^2 / 8) of every pair of entries of (B, C, k) and (B, D, k)."""
    return jnp.exp(-jnp.square(a[:, :, None] - b[:, None]) / 8)


def kdsvd(student: list[jax.Array], teacher: list[jax.Array], *, count: int = 1) -> jax.Array:
    """Squared differences of the RBF similarities of neighbouring stages' singular vectors, summed, (B,).

    Lee et al. 2018, as in RepDistiller. Maps (B, H, W, C) of equal widths; `count` singular vectors a stage, each
    scaled by its share of the singular values' norm. The sign between two stages is the decomposition's, which the
    value depends on.

    Raises:
      ValueError: other widths.
    """
    values, before = [], None
    for s, t in zip(student, teacher, strict=True):
        if s.shape[-1] != t.shape[-1]:
            raise ValueError(f"kdsvd compares equal widths only, not maps of {s.shape[-1]} and {t.shape[-1]} channels")
        now = _principal(*map(_pixels, wide(s, jax.lax.stop_gradient(t))), count)
        if before is not None:
            own, other = (_similarity(*pair) for pair in zip(now, before, strict=True))
            values.append(jnp.sum(jnp.square(own - other), axis=(1, 2, 3)))
        before = now
    return sum(values)
