"""OFA-KD's exit branches: from a feature of the student to class logits, in training only.

Source: Hao et al. 2023 (arXiv 2310.19444, section 3.2), in the form of the authors' code: convolutional students have
depthwise-separable convolutions towards the last resolution, all others transformer blocks on a 7 x 7 grid.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones.swin import PatchMerging
from research.layers.init import kaiming_fan_out, torch_bias
from research.layers.mlp import gelu
from research.layers.norm import BatchNorm
from research.layers.pool import global_mean
from research.layers.transformer import Block

LAST_STAGE = 4
GRID = 7  # the side that patches are merged towards
HEADS = 4

normal = nn.initializers.normal(0.02)


class SepConv(nn.Module):
    """Two depthwise-separable convolutions, the first of stride 2: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), F).

    Parts are numbered as in the authors' sequence, whose 3 and 7 are activations.
    """

    features: int
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        options = {"use_bias": False, "kernel_init": kaiming_fan_out, "dtype": self.dtype}
        for first, stride, features in ((0, 2, width), (4, 1, self.features)):
            depthwise = {"strides": stride, "padding": ((1, 1), (1, 1)), "feature_group_count": width}
            x = nn.Conv(width, (3, 3), **depthwise, **options, name=f"op_{first}")(x)
            x = nn.Conv(features, (1, 1), **options, name=f"op_{first + 1}")(x)
            x = nn.relu(BatchNorm(group=self.group, dtype=self.dtype, name=f"op_{first + 2}")(x, train))
        return x


class MapBranch(nn.Module):
    """The branch of a convolutional student: a map (B, H, W, C) of stage 1 to 4 -> logits (B, num_classes).

    Each stage before the last is one `SepConv`, whose channels double until the last gives `width`.
    """

    stage: int
    width: int
    num_classes: int
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        steps, channels = LAST_STAGE - self.stage, x.shape[-1]
        for step in range(steps):
            features = self.width if step == steps - 1 else channels * 2 ** (step + 1)
            x = SepConv(features, self.group, self.dtype, name=f"down_{step}")(x, train)
        if not steps:
            options = {"kernel_init": kaiming_fan_out, "bias_init": torch_bias(channels), "dtype": self.dtype}
            x = nn.Conv(self.width, (1, 1), name="conv", **options)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=normal, name="fc")(global_mean(x))


class TokenBranch(nn.Module):
    """The branch of a student of tokens: (B, prefix + H * W, C) of stage 1 to 4 -> logits (B, num_classes).

    Patches are merged, 2 x 2 at a time, until fewer than 14 are left on a side, while the `prefix` tokens (the class
    token) pass by; blocks follow, more of them for shallow stages. The classifier sees the prefix token, the mean of
    them where there are two, or the mean of the patches where there is none.

    Fields:
      width: that merging leads to, the student's before its classifier. Prefix tokens must have it already, and so
        must, officially, patches that are not merged; here they keep their own.
    """

    stage: int
    width: int
    num_classes: int
    prefix: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.astype(self.dtype)
        tokens, patches = x[:, : self.prefix], x[:, self.prefix :]
        side, merges = math.isqrt(patches.shape[1]), merge_steps(patches.shape[1])
        patches = patches.reshape(x.shape[0], side, side, -1)
        for step in range(merges):
            patches = PatchMerging(self.width, self.dtype, name=f"merge_{step}")(patches)
            # The last of several steps has no activation, a single one has.
            patches = gelu(patches) if step == 0 or step < merges - 1 else patches
        patches = patches.reshape(x.shape[0], -1, patches.shape[-1])
        x = jnp.concatenate([tokens, patches], axis=1) if self.prefix else patches
        for index in range(max(LAST_STAGE - self.stage, 1)):
            block = Block(HEADS, qkv_bias=False, epsilon=1e-5, dtype=self.dtype, name=f"blocks_{index}")
            x = block(x, train)
        x = jnp.mean(x[:, : self.prefix] if self.prefix else x, axis=1)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=normal, name="head")(x)


class Branches(nn.Module):
    """A branch for each of the student's stages: {stage: feature} -> {stage: logits (B, num_classes)}.

    Fields:
      student, teacher: widths of the networks before their classifiers.
      prefix: class tokens before the patches.
      group: examples a batch-norm group, see `research.layers.norm.BatchNorm`.
    Maps (B, H, W, C) get a `MapBranch` as wide as the wider network, tokens (B, N, C) a `TokenBranch` as wide as the
    student.
    """

    student: int
    teacher: int
    num_classes: int
    prefix: int = 0
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[int, jax.Array], train: bool = True) -> dict[int, jax.Array]:
        logits = {}
        for stage, x in features.items():
            shared = {"num_classes": self.num_classes, "dtype": self.dtype, "name": f"stage{stage}"}
            if x.ndim == 4:
                branch = MapBranch(stage, max(self.student, self.teacher), group=self.group, **shared)
            else:
                branch = TokenBranch(stage, self.student, prefix=self.prefix, **shared)
            logits[stage] = branch(x, train)
        return logits


def merge_steps(patches: int) -> int:
    """How often `patches` tokens are merged: the power of two in their side over 7, rounded down, and at least none.

    Raises:
      ValueError: they form no square, or one whose side does not halve so often.
    """
    side = math.isqrt(patches)
    steps = max((side // GRID).bit_length() - 1, 0)
    if side * side != patches or side % 2**steps:
        raise ValueError(f"ofa: {patches} tokens form no square grid whose side can be halved {steps} times")
    return steps


# Official names (Hao840/OFAKD). The classifier of a map's branch comes after its convolutions, pooling and flattening.
NAMES = [
    (r"^stage1\.fc\.", "projector.1.5."),
    (r"^stage2\.fc\.", "projector.2.4."),
    (r"^stage([34])\.fc\.", r"projector.\1.3."),
    (r"^stage(\d)\.head\.", r"projector.\1.3."),
    (r"^stage(\d)\.conv\.", r"projector.\1.0."),
    (r"^stage(\d)\.down_(\d+)\.op_(\d)\.", r"projector.\1.\2.op.\3."),
    (r"^stage(\d)\.merge_(\d+)\.", r"projector.\1.0.fn.\2."),
    (r"^stage(\d)\.blocks_(\d+)\.", r"projector.\1.1.\2."),
]
