"""BiT's ResNet V2: pre-activation, group norms and standardised weights, so that no example sees another.

Sources: He et al. 2016 (pre-activation, arXiv 1603.05027); Kolesnikov et al. 2020 (Big Transfer, arXiv 1912.11370);
Qiao et al. 2019 (weight standardisation, arXiv 1903.10520). Arguments and official names are timm's.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import HALF, Input
from research.layers import drop
from research.layers.drop import Dropout, DropPath
from research.layers.init import kaiming_fan_out
from research.layers.mobile import round_width
from research.layers.norm import GroupNorm, accumulation_dtype
from research.layers.pool import global_mean
from research.layers.remat import rematerialised


class StdConv(nn.Module):
    """A convolution without bias and with standardised filters: (B, H, W, C) -> (B, H', W', features).

    Every filter is brought to mean 0 and variance 1, where the variance is the biased one plus `epsilon`. Padded
    symmetrically as PyTorch pads.
    """

    features: int
    size: int
    stride: int = 1
    epsilon: float = 1e-8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pad = (self.size - 1) // 2
        kernel = self.param("kernel", kaiming_fan_out, (self.size, self.size, x.shape[-1], self.features))
        kernel = kernel.astype(accumulation_dtype(kernel))
        kernel = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
        variance = jnp.mean(jnp.square(kernel), axis=(0, 1, 2), keepdims=True)
        kernel = (kernel * jax.lax.rsqrt(variance + self.epsilon)).astype(self.dtype)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel,
            (self.stride, self.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Block(nn.Module):
    """A pre-activation bottleneck: (B, H, W, C) -> (B, H/stride, W/stride, features).

    Fields:
      projected: the shortcut is a 1x1 convolution of the normalised map.
      groups: of the group norms.
      epsilon: of the weight standardisation.
    """

    features: int
    stride: int = 1
    projected: bool = False
    groups: int = 32
    epsilon: float = 1e-8
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        layer = functools.partial(StdConv, epsilon=self.epsilon, dtype=self.dtype)
        act = lambda name, y: nn.relu(GroupNorm(self.groups, dtype=self.dtype, name=name)(y))
        width = round_width(self.features / 4)
        y = act("norm1", x)
        if self.projected:
            x = layer(self.features, 1, self.stride, name="downsample_conv")(y)
        y = act("norm2", layer(width, 1, name="conv1")(y))
        y = act("norm3", layer(width, 3, self.stride, name="conv2")(y))
        y = layer(self.features, 1, name="conv3")(y)
        return x + DropPath(self.drop_path)(y, train)


class ResNetV2(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm unless noted:
      layers, channels: blocks and channels of each stage; `stem_chs`: of the first convolution.
      width_factor: of all channels.
      groupnorm_groups: groups of the norms (in timm an argument of the norm).
      conv_eps: of the weight standardisation (in timm an argument of the convolution).
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      remat: see `research.layers.remat`.

    Endpoints: `stem` (before the pooling), `stem_pooled`, `stage1`.. (not normalised), `pooled` (the mean of the
    normalised last stage). With `num_classes` 0 the logits are the pooled features.
    """

    layers: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_chs: int = 64
    width_factor: int = 1
    groupnorm_groups: int = 32
    conv_eps: float = 1e-8
    num_classes: int = 1000
    drop_rate: float = 0.0
    drop_path: float = 0.0
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        shared = {"epsilon": self.conv_eps, "dtype": self.dtype}
        x = StdConv(round_width(self.stem_chs * self.width_factor), 7, 2, name="stem_conv", **shared)(images)
        endpoints = {"stem": x}
        # BiT's "fixed" padding is of zeros, which beat negative neighbours.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = endpoints["stem_pooled"] = nn.max_pool(x, (3, 3), (2, 2))

        block = rematerialised(Block, self.remat)
        rates = iter(drop.rates(self.drop_path, sum(self.layers)))
        for stage, (depth, channels) in enumerate(zip(self.layers, self.channels, strict=True)):
            for index in range(depth):
                x = block(
                    features=round_width(channels * self.width_factor),
                    stride=2 if stage and index == 0 else 1,
                    projected=index == 0,
                    groups=self.groupnorm_groups,
                    drop_path=next(rates),
                    name=f"stages_{stage}_blocks_{index}",
                    **shared,
                )(x, train)
            endpoints[f"stage{stage + 1}"] = x

        x = nn.relu(GroupNorm(self.groupnorm_groups, dtype=self.dtype, name="norm")(x))
        pooled = endpoints["pooled"] = global_mean(x)
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        head_init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=head_init, name="head_fc")(x), endpoints


def build(**arguments) -> ResNetV2:
    """The module; see `ResNetV2` for the arguments."""
    return ResNetV2(**arguments)


_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_SIZES = ((50, 1), (50, 3), (101, 1), (101, 3), (152, 2), (152, 4))

VARIANTS = {
    f"resnetv2_{depth}x{factor}_bit": {"layers": _DEPTHS[depth], "width_factor": factor} for depth, factor in _SIZES
}

# The two default checkpoints of 224 pixels are the student and the teacher of Beyer et al. 2022 (arXiv 2106.05237).
INPUTS = {
    **{name: Input(size=448, mean=HALF, std=HALF, crop=1.0) for name in VARIANTS},
    **dict.fromkeys(("resnetv2_50x1_bit", "resnetv2_152x2_bit"), Input(mean=HALF, std=HALF)),
    "resnetv2_152x4_bit": Input(size=480, mean=HALF, std=HALF, crop=1.0),
}

NAMES = {
    "timm": [
        (r"^stem_conv", "stem.conv"),
        (r"^stages_(\d+)_blocks_(\d+)", r"stages.\1.blocks.\2"),
        (r"\.downsample_conv", ".downsample.conv"),
        (r"^head_fc", "head.fc"),
        (r"^head\.fc\.weight$", "head.fc.weight", lambda shape: (*shape, 1, 1)),
    ]
}
