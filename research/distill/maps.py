"""Distillation of statistics of feature maps, which networks of other widths share: attention, selectivity, flow.

Maps are (B, H, W, C), the teacher's constants; where sizes differ the larger map is average-pooled to the smaller.
Losses of one stage give (B,) values; a method sums its stages. Nothing here is trained, see `hints` for that.
"""

import jax
import jax.numpy as jnp

from research.distill.features import adaptive_pool
from research.distill.logits import pearson
from research.distill.numerics import gram, norm, unit, wide


def same_size(student: jax.Array, teacher: jax.Array) -> list[jax.Array]:
    """Both maps at the size of the one of smaller height, in the dtype to compute in; the teacher's as a constant."""
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    if student.shape[1] > teacher.shape[1]:
        student = adaptive_pool(student, teacher.shape[1:3])
    elif student.shape[1] < teacher.shape[1]:
        teacher = adaptive_pool(teacher, student.shape[1:3])
    return [student, teacher]


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def attention(x: jax.Array, power: int = 2) -> jax.Array:
    """mean_c x^power over the channels at unit length, (B, H * W). Zagoruyko & Komodakis 2017."""
    return unit(flat(jnp.mean(x**power, axis=-1)))


def at(student: jax.Array, teacher: jax.Array, *, power: int = 2) -> jax.Array:
    """Mean squared difference of the attention maps, (B,): attention transfer as everyone's code has it.

    The published runs sum it over the stages and weigh it by 1000.
    """
    s, t = (attention(x, power) for x in same_size(student, teacher))
    return jnp.mean(jnp.square(s - t), axis=-1)


def at_paper(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Euclidean distance of the attention maps, (B,): equation 2 of the paper, as in torchdistill."""
    s, t = (attention(x) for x in same_size(student, teacher))
    return norm(s - t)


def _selectivity(x: jax.Array) -> jax.Array:
    """The map as (B, C, H * W), each channel at unit length."""
    return unit(jnp.moveaxis(x, -1, 1).reshape(x.shape[0], x.shape[-1], -1))


def _kernel_mean(a: jax.Array, b: jax.Array) -> jax.Array:
    """mean over channel pairs of <a_i, b_j>^2, (B,), through the smaller of the two Gram matrices that give it."""
    pairs, pixels = a.shape[1] * b.shape[1], a.shape[2]
    if pixels**2 < pairs:
        over_channels = [gram(*[jnp.swapaxes(x, 1, 2)] * 2) for x in (a, b)]
        return jnp.sum(over_channels[0] * over_channels[1], axis=(1, 2)) / pairs
    return jnp.mean(jnp.square(gram(a, b)), axis=(1, 2))


def nst(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Squared maximum mean discrepancy of the channels, polynomial kernel <a, b>^2, (B,). Huang & Wang 2017.

    mean k(t, t) + mean k(s, s) - 2 mean k(s, t) with channels at unit length; summed over the stages with weight 50.
    """
    s, t = map(_selectivity, same_size(student, teacher))
    return _kernel_mean(t, t) + _kernel_mean(s, s) - 2 * _kernel_mean(s, t)


def flow(maps: list[jax.Array]) -> list[jax.Array]:
    """Mean products of the channels of consecutive maps, [(B, C_next, C)]: the FSP matrices. Yim et al. 2017."""
    found = []
    for bottom, top in zip(maps[:-1], maps[1:], strict=True):
        bottom, top = wide(bottom, top)
        if bottom.shape[1] > top.shape[1]:
            bottom = adaptive_pool(bottom, top.shape[1:3])
        elif bottom.shape[1] < top.shape[1]:
            top = adaptive_pool(top, bottom.shape[1:3])
        top, bottom = (jnp.moveaxis(x, -1, 1).reshape(x.shape[0], x.shape[-1], -1) for x in (top, bottom))
        found.append(gram(top, bottom) / top.shape[-1])
    return found


def fsp(student: list[jax.Array], teacher: list[jax.Array]) -> jax.Array:
    """Mean squared difference of the FSP matrices, summed over neighbouring stages, (B,).

    The published runs train with it alone in a first stage, weight 50. Raises a ValueError for other widths.
    """
    for s, t in zip(student, teacher, strict=True):
        if s.shape[-1] != t.shape[-1]:
            raise ValueError(f"fsp compares equal widths only, not maps of {s.shape[-1]} and {t.shape[-1]} channels")
    pairs = zip(flow(student), flow(jax.lax.stop_gradient(teacher)), strict=True)
    return sum(jnp.mean(jnp.square(s - t), axis=(1, 2)) for s, t in pairs)


def channel_correlation(student: jax.Array, teacher: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """Mean over the pixels of the correlation of both maps' channels, (B,): a term of torchdistill's DIST+.

    There this similarity is *added* to the loss, and so minimised; the widths must be equal.
    """
    student, teacher = same_size(student, teacher)
    return jnp.mean(pearson(student, teacher, -1, eps), axis=(1, 2))


def spatial_correlation(student: jax.Array, teacher: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """1 - mean over the pixels of the correlation over the batch of both maps' channel sums, a scalar: of DIST+."""
    s, t = (flat(jnp.sum(x, axis=-1)) for x in same_size(student, teacher))
    return 1 - jnp.mean(pearson(s, t, 0, eps, clamp=True))
