"""Distillation of feature maps: adaptors from the student's maps to the teacher's, and the losses between them.

Maps are (B, H, W, C). Losses give one value an example, (B,).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.distill.numerics import wide
from research.layers.norm import BatchNorm

# PyTorch's initialisers of convolutions: its default, and kaiming_uniform_ with a = 1.
TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
KAIMING_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


def mse(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference of the maps, (B,): FitNet's hint loss, Romero et al. 2015, eq. 3."""
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    return jnp.mean(jnp.square(student - teacher), axis=tuple(range(1, student.ndim)))


def srrl(
    student: jax.Array,
    teacher: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    feature_weight: float | jax.Array = 1.0,
    logit_weight: float | jax.Array = 1.0,
) -> jax.Array:
    """Mean squared difference of pooled features (B, C), and of what the teacher's classifier makes of them, (B,).

    Yang et al. 2021 (softmax regression representation learning). The student's feature is that of its map
    through an `activations.Connector` with ReLU.

    Args:
      kernel, bias: (C, classes) and (classes,) of the teacher's last layer, constants.
    """
    kernel, bias = jax.lax.stop_gradient((kernel, bias))
    student, teacher, kernel, bias = wide(student, jax.lax.stop_gradient(teacher), kernel, bias)
    logits = (x @ kernel + bias[None, :] for x in (student, teacher))
    return feature_weight * mse(student, teacher) + logit_weight * mse(*logits)


class ConvReg(nn.Module):
    """Maps a student's feature map onto a teacher's size and width: convolution, batch norm, ReLU (mdistiller).

    The convolution follows the heights: twice the teacher's, 3x3 of stride 2; half of it, a transposed 4x4 of stride 2;
    otherwise an unpadded one of size 1 + the difference, a 1x1 for equal sizes.

    Fields:
      features: channels of the teacher's map.
      size: its (height, width).
      group: examples a batch-norm group, see `research.layers.norm.BatchNorm`.
    Raises:
      ValueError: no such convolution leads from the student's size to the teacher's.
    """

    features: int
    size: tuple[int, int]
    relu: bool = True
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        size, (height, width) = x.shape[1:3], self.size
        options = {"kernel_init": TORCH_INIT, "dtype": self.dtype, "name": "conv"}
        if size[0] == 2 * height:
            conv = nn.Conv(self.features, (3, 3), strides=(2, 2), padding=1, **options)
        elif 2 * size[0] == height:
            # A kernel of 4 and PyTorch's padding of 1 crop the full output by one on each side: 4 - 1 - 1 = 2 here.
            padding = ((2, 2), (2, 2))
            conv = nn.ConvTranspose(self.features, (4, 4), (2, 2), padding, transpose_kernel=True, **options)
        elif size[0] >= height and size[1] >= width:
            conv = nn.Conv(self.features, (1 + size[0] - height, 1 + size[1] - width), padding="VALID", **options)
        else:
            raise ValueError(f"ConvReg: no convolution leads from a student's {size} feature map to a {self.size} one")
        x = conv(x)
        if x.shape[1:3] != (height, width):
            raise ValueError(f"ConvReg: a student's {size} feature map becomes {x.shape[1:3]}, not {self.size}")
        x = BatchNorm(group=self.group, dtype=self.dtype, name="bn")(x, train)
        return nn.relu(x) if self.relu else x


def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes (B, H, W, C) to `size`, each output taking the input at floor(i * in / out): PyTorch's `nearest`."""
    for axis, out in zip((1, 2), size, strict=True):
        if x.shape[axis] != out:
            x = jnp.take(x, np.arange(out) * x.shape[axis] // out, axis=axis)
    return x


def _bins(size: int, count: int) -> np.ndarray:
    """(count, size) weights of adaptive average pooling: bin i spans floor(i size/count) to ceil((i+1) size/count)."""
    positions, bins = np.arange(size), np.arange(count)[:, None]
    inside = (positions >= bins * size // count) & (positions < -(-(bins + 1) * size // count))
    return inside / inside.sum(axis=1, keepdims=True)


def adaptive_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Average pooling of (B, H, W, C) to `size` by PyTorch's adaptive bins, which overlap unless sizes divide."""
    rows, columns = (jnp.asarray(_bins(n, m), x.dtype) for n, m in zip(x.shape[1:3], size, strict=True))
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns, precision=jax.lax.Precision.HIGHEST)


def hcl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Hierarchical context loss of one level, (B,): MSE of the maps and of their 4x4, 2x2 and 1x1 means.

    The pooled terms weigh 1/2, 1/4 and 1/8, those not smaller than the map are left out, and the sum is divided by the
    sum of the weights (by their order: a map of height 4 gives 1/2 to its 2x2 means). Chen et al. 2021, section 3.4.
    """
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    total, weight, weights = mse(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[1]:
            weight /= 2
            total += weight * mse(*(adaptive_pool(x, (side, side)) for x in (student, teacher)))
            weights += weight
    return total / weights


class ABF(nn.Module):
    """Attention-based fusion: a level's map (B, h, w, c) and the deeper level's fused map, or None for the deepest.

    Returns the map at the teacher's width and size, and the fused map handed on to the next level. Chen et al. 2021,
    figure 3b.
    """

    mid: int
    features: int
    size: tuple[int, int]
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, deeper: jax.Array | None, train: bool = True) -> tuple[jax.Array, jax.Array]:
        options = {"use_bias": False, "kernel_init": KAIMING_INIT, "dtype": self.dtype}
        x = nn.Conv(self.mid, (1, 1), name="conv1", **options)(x)
        x = BatchNorm(group=self.group, dtype=self.dtype, name="norm1")(x, train)
        if deeper is not None:
            deeper = nearest(deeper, x.shape[1:3])
            both = jnp.concatenate([x, deeper], axis=-1)
            attention = nn.Conv(2, (1, 1), kernel_init=TORCH_INIT, dtype=self.dtype, name="attention")(both)
            attention = nn.sigmoid(attention)
            x = x * attention[..., :1] + deeper * attention[..., 1:]
        x = nearest(x, self.size)
        out = nn.Conv(self.features, (3, 3), padding=1, name="conv2", **options)(x)
        return BatchNorm(group=self.group, dtype=self.dtype, name="norm2")(out, train), x


class Review(nn.Module):
    """ReviewKD's student side: fuses the student's levels from the deepest up, each to the size of a teacher's map.

    Called with the student's maps [(B, h, w, c)], shallow to deep, and the (height, width, channels) of the teacher's;
    returns maps of those shapes in the same order. The common width is that of the deepest level, at most `max_mid`.
    """

    max_mid: int = 512
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: list[jax.Array], shapes: list[tuple[int, ...]], train: bool = True) -> list[jax.Array]:
        mid = min(self.max_mid, maps[-1].shape[-1])
        results, fused = [], None
        for depth, (x, shape) in enumerate(zip(maps[::-1], shapes[::-1], strict=True)):
            fuse = ABF(mid, shape[-1], tuple(shape[:2]), self.group, self.dtype, name=f"abfs_{depth}")
            out, fused = fuse(x, fused, train)
            results.insert(0, out)
        return results


# Official (mdistiller, vanillaKD) names of Review's parameters; abfs.0 is the deepest level there too.
REVIEW_NAMES = [
    (r"^abfs_(\d+)", r"abfs.\1"),
    (r"\.conv([12])\.", r".conv\1.0."),
    (r"\.norm([12])\.", r".conv\1.1."),
    (r"\.attention\.", ".att_conv.0."),
]


def review(student: list[jax.Array], teacher: list[jax.Array]) -> jax.Array:
    """ReviewKD's loss, (B,): the hierarchical context losses of all levels, summed. Chen et al. 2021, eq. 7."""
    return sum(hcl(s, t) for s, t in zip(student, teacher, strict=True))
