"""MobileNetV2: inverted residuals with linear bottlenecks.

Source: Sandler et al. 2018 (arXiv 1801.04381), tables 1 and 2. Official names and widths are timm's.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.drop import Dropout
from research.layers.init import kaiming_fan_out
from research.layers.norm import BatchNorm
from research.layers.pool import global_mean
from research.layers.remat import rematerialised

# (expansion, channels, repeats, stride) of each group; without expansion a block is a depthwise-separable convolution.
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

# Kaiming normal, fan-out, counts the outputs of one group: a depthwise kernel has nine.
depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def round_width(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8 and at least 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def classifier_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Uniform within 1/sqrt(classes): timm's initialiser of EfficientNets takes the classes for the fan-in."""
    return jax.random.uniform(key, shape, dtype, -(shape[-1] ** -0.5), shape[-1] ** -0.5)


def conv(features: int, size: int, stride: int = 1, **kwargs) -> nn.Conv:
    """A convolution without bias, padded symmetrically as PyTorch pads."""
    pad = (size - 1) // 2
    options = {"kernel_init": kaiming_fan_out, "padding": ((pad, pad),) * 2, "use_bias": False, **kwargs}
    return nn.Conv(features, (size, size), (stride, stride), **options)


class Block(nn.Module):
    """Expansion, 3x3 depthwise convolution, linear projection: (B, H, W, C) -> (B, H/stride, W/stride, features).

    Fields:
      expand: width of the depthwise convolution over C; 1 leaves the expansion out.
    """

    features: int
    expand: int = 6
    stride: int = 1
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        plain = self.expand == 1
        names = ("conv_dw", "conv_pw") if plain else ("conv_pw", "conv_dw", "conv_pwl")
        width = x.shape[-1] if plain else round_width(self.expand * x.shape[-1])
        layers = {
            "conv_dw": (width, 3, self.stride, {"feature_group_count": width, "kernel_init": depthwise_init}),
            "conv_pw": (self.features if plain else width, 1, 1, {}),
            "conv_pwl": (self.features, 1, 1, {}),
        }
        y = x
        for index, name in enumerate(names, start=1):
            features, size, stride, options = layers[name]
            y = conv(features, size, stride, dtype=self.dtype, name=name, **options)(y)
            y = norm(name=f"bn{index}")(y, train)
            y = y if index == len(names) else nn.relu6(y)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class MobileNetV2(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields:
      width: factor on all channels but the last convolution's, which has at least `head`.
      groups: (expansion, channels, repeats, stride) of each group of blocks, see `GROUPS`.
      stem, head: channels of the first convolution, before `width`, and of the last one.
      drop_rate: dropout before the classifier.
      bn_group: examples a batch-norm group, None for the global batch.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `stage1`.. (the last block at each resolution from a quarter on), `features` (the last
    convolution's map), `pooled`. With `num_classes` 0 the logits are the pooled features.
    """

    width: float = 1.0
    groups: tuple[tuple[int, int, int, int], ...] = GROUPS
    stem: int = 32
    head: int = 1280
    num_classes: int = 1000
    drop_rate: float = 0.0
    bn_group: int | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        x = conv(round_width(self.stem * self.width), 3, 2, dtype=self.dtype, name="conv_stem")(
            images.astype(self.dtype)
        )
        x = nn.relu6(norm(name="bn1")(x, train))
        endpoints, halvings = {"stem": x}, 0

        block = rematerialised(Block, self.remat)
        for group, (expand, channels, repeats, stride) in enumerate(self.groups):
            halvings += stride == 2
            for index in range(repeats):
                x = block(
                    features=round_width(channels * self.width),
                    expand=expand,
                    stride=stride if index == 0 else 1,
                    bn_group=self.bn_group,
                    dtype=self.dtype,
                    name=f"blocks_{group}_{index}",
                )(x, train)
            if halvings:
                endpoints[f"stage{halvings}"] = x

        x = conv(max(self.head, round_width(self.head * self.width)), 1, dtype=self.dtype, name="conv_head")(x)
        x = endpoints["features"] = nn.relu6(norm(name="bn2")(x, train))
        pooled = endpoints["pooled"] = global_mean(x)
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=classifier_init, name="classifier")
        return head(x), endpoints


def build(**arguments) -> MobileNetV2:
    """The module; see `MobileNetV2` for the arguments."""
    return MobileNetV2(**arguments)


_WIDTHS = {"035": 0.35, "050": 0.5, "075": 0.75, "100": 1.0, "140": 1.4}
VARIANTS = {f"mobilenetv2_{name}": {"width": width} for name, width in _WIDTHS.items()}

NAMES = {"timm": [(r"^blocks_(\d+)_(\d+)", r"blocks.\1.\2")]}
