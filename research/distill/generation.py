"""Distillation by generating the teacher's features from part of the student's: MGD, ViTKD.

Maps are (B, H, W, C), tokens (B, N, C); the teacher's are constants. Losses are sums over elements, (B,): their small
weights are part of the methods.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.distill.features import TORCH_INIT
from research.distill.numerics import wide


def _summed_square(student: jax.Array, teacher: jax.Array) -> jax.Array:
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    return jnp.sum(jnp.square(student - teacher), axis=tuple(range(1, student.ndim)))


class Generation(nn.Module):
    """3x3 convolution, ReLU, 3x3 convolution, (B, H, W, C) -> (B, H, W, features)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"padding": 1, "kernel_init": TORCH_INIT, "dtype": self.dtype}
        x = nn.relu(nn.Conv(self.features, (3, 3), name="conv0", **options)(x))
        return nn.Conv(self.features, (3, 3), name="conv2", **options)(x)


class Masked(nn.Module):
    """MGD's student side: a 1x1 convolution to the teacher's width where it differs, the mask, a `Generation`.

    Called with the student's map (B, H, W, c) and a mask of 0 and 1 that broadcasts to (B, H, W, features). Kept
    entries are not scaled up.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), kernel_init=TORCH_INIT, dtype=self.dtype, name="align")(x)
        return Generation(self.features, self.dtype, name="generation")(x * mask.astype(x.dtype))


def channel_mask(uniform: jax.Array, ratio: float | jax.Array = 0.15) -> jax.Array:
    """0 where `uniform` (B, 1, 1, C) in [0, 1) is below `ratio`: whole channels, of classifiers."""
    return (uniform >= ratio).astype(uniform.dtype)


def spatial_mask(uniform: jax.Array, ratio: float | jax.Array = 0.65) -> jax.Array:
    """0 where `uniform` (B, H, W, 1) in [0, 1) is above 1 - `ratio`: positions, of detectors and segmenters."""
    return (uniform <= 1 - ratio).astype(uniform.dtype)


def mgd(generated: jax.Array, teacher: jax.Array, *, alpha: float | jax.Array = 7e-5) -> jax.Array:
    """alpha sum (generated - teacher)^2, (B,). Yang et al. 2022; alpha 2e-5 for dense tasks.

    Raises:
      ValueError: other sizes; MGD distils maps of equal sizes only.
    """
    if generated.shape != teacher.shape:
        raise ValueError(f"mgd compares maps of one shape, not {generated.shape[1:]} and {teacher.shape[1:]}")
    return alpha * _summed_square(generated, teacher)


def removed_tokens(noise: jax.Array, ratio: float = 0.5) -> jax.Array:
    """1 for the tokens that ViTKD masks, (B, N): all but the int(N (1 - ratio)) of least `noise` (B, N)."""
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    return (rank >= int(noise.shape[-1] * (1 - ratio))).astype(noise.dtype)


class TokenGeneration(nn.Module):
    """ViTKD's student side: shallow tokens to the teacher's width, deep tokens masked and generated.

    Called with the student's shallow tokens [(B, N, c)], its deep ones (B, N, c), all without class token, and the mask
    (B, N) of `removed_tokens`, whose tokens are replaced by a trained one. Returns tokens of the same numbers in the
    teacher's width. Equal widths have no linear maps.

    Raises:
      ValueError: the tokens form no square.
    """

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, shallow: Sequence[jax.Array], deep: jax.Array, removed: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        side = math.isqrt(deep.shape[1])
        if side**2 != deep.shape[1]:
            raise ValueError(f"vitkd lays tokens out as a square, which {deep.shape[1]} do not fill: drop class tokens")
        shallow = list(shallow)
        if deep.shape[-1] != self.features:
            options = {"kernel_init": TORCH_INIT, "dtype": self.dtype}
            shallow = [nn.Dense(self.features, name=f"align2_{k}", **options)(x) for k, x in enumerate(shallow)]
            deep = nn.Dense(self.features, name="align", **options)(deep)
        token = self.param("mask_token", nn.initializers.zeros, (1, 1, self.features)).astype(deep.dtype)
        deep = jnp.where(removed[..., None] > 0, token, deep)
        grid = deep.reshape(deep.shape[0], side, side, self.features)
        generated = Generation(self.features, self.dtype, name="generation")(grid)
        return shallow, generated.reshape(deep.shape)


def vitkd(
    shallow: Sequence[jax.Array],
    generated: jax.Array,
    teacher_shallow: Sequence[jax.Array],
    teacher_deep: jax.Array,
    removed: jax.Array,
    *,
    alpha: float | jax.Array = 3e-5,
    beta: float | jax.Array = 3e-6,
    ratio: float = 0.5,
) -> jax.Array:
    """alpha sum (shallow - teacher)^2 + beta / ratio sum over removed tokens (generated - teacher)^2, (B,).

    Yang et al. 2022 (ViTKD): the first two blocks are mimicked, the last is generated. The arguments are
    what a `TokenGeneration` returns and the mask it was given.
    """
    mimicked = sum(_summed_square(s, t) for s, t in zip(shallow, teacher_shallow, strict=True))
    generated, teacher_deep, removed = wide(generated, teacher_deep, removed)
    removed = removed[..., None]
    return alpha * mimicked + beta / ratio * _summed_square(generated * removed, teacher_deep * removed)


# Official (cls_KD) names of the parameters of Masked and TokenGeneration.
NAMES = [(r"generation\.conv(\d)", r"generation.\1"), (r"align2_(\d)", r"align2.\1")]
