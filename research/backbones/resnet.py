"""ResNet, Wide ResNet, ResNeXt and the "D" forms with a deep stem and averaging shortcuts.

Sources: He et al. 2016 (arXiv 1512.03385), with the stride in the 3x3 convolution; Zagoruyko & Komodakis 2016 (wide);
Xie et al. 2017 (ResNeXt); He et al. 2019 (arXiv 1812.01187, "D"). Arguments and official names are timm's.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import Input
from research.layers import drop
from research.layers.drop import Dropout
from research.layers.init import kaiming_fan_out, torch_linear
from research.layers.norm import BatchNorm
from research.layers.pool import avg_pool_ceil, global_mean, max_pool
from research.layers.remat import rematerialised

EXPANSION = {"basic": 1, "bottleneck": 4}


def conv(features: int, size: int, stride: int = 1, **kwargs) -> nn.Conv:
    """A convolution without bias, padded symmetrically as PyTorch pads, initialised for ReLU."""
    pad = (size - 1) // 2
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=kaiming_fan_out,
        **kwargs,
    )


class Block(nn.Module):
    """A residual block: (B, H, W, C) -> (B, H/stride, W/stride, features), after and before the last ReLU.

    Fields:
      block: `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3 with the stride, 1x1).
      features: channels of the output.
      width: channels inside.
      shortcut: `identity`, `conv` (1x1 with the stride) or `avg` (2x2 average where there is a stride, then 1x1).
    """

    block: str
    features: int
    width: int
    stride: int = 1
    groups: int = 1
    shortcut: str = "identity"
    drop_path: float = 0.0
    bn_group: int | None = None
    zero_init_last: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        layer = functools.partial(conv, dtype=self.dtype)
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        last_scale = nn.initializers.zeros if self.zero_init_last else nn.initializers.ones

        if self.block == "basic":
            y = layer(self.width, 3, self.stride, name="conv1")(x)
            y = nn.relu(norm(name="bn1")(y, train))
            y = layer(self.features, 3, name="conv2")(y)
            y = norm(name="bn2", scale_init=last_scale)(y, train)
        else:
            y = nn.relu(norm(name="bn1")(layer(self.width, 1, name="conv1")(x), train))
            y = layer(self.width, 3, self.stride, feature_group_count=self.groups, name="conv2")(y)
            y = nn.relu(norm(name="bn2")(y, train))
            y = layer(self.features, 1, name="conv3")(y)
            y = norm(name="bn3", scale_init=last_scale)(y, train)
        y = drop.DropPath(self.drop_path)(y, train)

        if self.shortcut != "identity":
            averaged = self.shortcut == "avg"
            stride = 1 if averaged else self.stride
            x = avg_pool_ceil(x) if averaged and self.stride > 1 else x
            x = layer(self.features, 1, stride, name=f"downsample_{self.shortcut}")(x)
            x = norm(name=f"downsample_{self.shortcut}_bn")(x, train)
        return nn.relu(x + y), x + y


class ResNet(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm:
      block: `basic` or `bottleneck`.
      layers, channels: blocks and base channels of each stage.
      stem_type: "" (7x7 of 64), `deep` (three 3x3 of `stem_width`, `stem_width`, 2 x `stem_width`), `deep_tiered`, or
        `small` (3x3 of `stem_width` without stride or pooling, for images of about 32 pixels; not in timm).
      avg_down: shortcuts average before their 1x1 convolution.
      cardinality, base_width: groups and their width (ResNeXt, Wide ResNet).
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      bn_group: examples a batch-norm group, None for the global batch.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `stage1`.., `pooled`, and `stem_preact`, `stage1_preact`.. before the last ReLU. `stem` is taken
    before the max pooling. With `num_classes` 0 the logits are the pooled features.
    """

    block: str = "bottleneck"
    layers: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    num_classes: int = 1000
    stem_width: int = 64
    stem_type: str = ""
    avg_down: bool = False
    cardinality: int = 1
    base_width: int = 64
    drop_rate: float = 0.0
    drop_path: float = 0.0
    zero_init_last: bool = True
    bn_group: int | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = images.astype(self.dtype)
        preact = self._stem(x, train)
        x = nn.relu(preact)
        endpoints = {"stem": x, "stem_preact": preact}
        x = x if self.stem_type == "small" else max_pool(x, 3, 2, 1)

        block = rematerialised(Block, self.remat)
        rates = iter(drop.rates(self.drop_path, sum(self.layers)))
        for stage, (depth, planes) in enumerate(zip(self.layers, self.channels, strict=True), start=1):
            features = planes * EXPANSION[self.block]
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                reshaped = index == 0 and (stride > 1 or x.shape[-1] != features)
                x, preact = block(
                    block=self.block,
                    features=features,
                    width=self._width(planes),
                    stride=stride,
                    groups=self.cardinality,
                    shortcut=("avg" if self.avg_down else "conv") if reshaped else "identity",
                    drop_path=next(rates),
                    bn_group=self.bn_group,
                    zero_init_last=self.zero_init_last,
                    dtype=self.dtype,
                    name=f"layer{stage}_{index}",
                )(x, train)
            endpoints |= {f"stage{stage}": x, f"stage{stage}_preact": preact}

        pooled = endpoints["pooled"] = global_mean(x)
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        return torch_linear(self.num_classes, pooled.shape[-1], dtype=self.dtype, name="fc")(x), endpoints

    def _stem(self, x: jax.Array, train: bool) -> jax.Array:
        layer = functools.partial(conv, dtype=self.dtype)
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        if self.stem_type == "":
            x = layer(64, 7, 2, name="conv1")(x)
        elif self.stem_type == "small":
            x = layer(self.stem_width, 3, name="conv1")(x)
        elif self.stem_type in ("deep", "deep_tiered"):
            first = self.stem_width if self.stem_type == "deep" else 3 * (self.stem_width // 4)
            x = nn.relu(norm(name="conv1_1")(layer(first, 3, 2, name="conv1_0")(x), train))
            x = nn.relu(norm(name="conv1_4")(layer(self.stem_width, 3, name="conv1_3")(x), train))
            x = layer(2 * self.stem_width, 3, name="conv1_6")(x)
        else:
            raise ValueError(f"stem_type: {self.stem_type!r} is none of '', 'deep', 'deep_tiered', 'small'")
        return norm(name="bn1")(x, train)

    def _width(self, planes: int) -> int:
        return planes if self.block == "basic" else int(planes * self.base_width / 64) * self.cardinality


def build(**arguments) -> ResNet:
    """The module; see `ResNet` for the arguments.

    Raises:
      ValueError: `block` is neither `basic` nor `bottleneck`, or a basic block is asked for groups or another width.
    """
    model = ResNet(**arguments)
    if model.block not in EXPANSION:
        raise ValueError(f"block: {model.block!r} is neither 'basic' nor 'bottleneck'")
    if model.block == "basic" and (model.cardinality, model.base_width) != (1, 64):
        raise ValueError("block='basic' takes no cardinality or base_width: use block='bottleneck'")
    return model


_DEPTHS = {
    "18": ("basic", (2, 2, 2, 2)),
    "34": ("basic", (3, 4, 6, 3)),
    "26": ("bottleneck", (2, 2, 2, 2)),
    "50": ("bottleneck", (3, 4, 6, 3)),
    "101": ("bottleneck", (3, 4, 23, 3)),
    "152": ("bottleneck", (3, 8, 36, 3)),
    "200": ("bottleneck", (3, 24, 36, 3)),
}
_PLAIN = {f"resnet{depth}": {"block": block, "layers": layers} for depth, (block, layers) in _DEPTHS.items()}
_D = {"stem_type": "deep", "stem_width": 32, "avg_down": True}
_T = {**_D, "stem_type": "deep_tiered"}

VARIANTS = {
    **_PLAIN,
    **{f"{name}d": {**arguments, **_D} for name, arguments in _PLAIN.items()},
    "resnet10t": {"block": "basic", "layers": (1, 1, 1, 1), **_T},
    "resnet14t": {"block": "bottleneck", "layers": (1, 1, 1, 1), **_T},
    "resnet26t": {**_PLAIN["resnet26"], **_T},
    "resnet50t": {**_PLAIN["resnet50"], **_T},
    "wide_resnet50_2": {**_PLAIN["resnet50"], "base_width": 128},
    "wide_resnet101_2": {**_PLAIN["resnet101"], "base_width": 128},
    "resnext50_32x4d": {**_PLAIN["resnet50"], "cardinality": 32, "base_width": 4},
    "resnext101_32x8d": {**_PLAIN["resnet101"], "cardinality": 32, "base_width": 8},
}

INPUTS = {
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), Input(crop=0.95)),
    **dict.fromkeys(("resnet101d", "resnet152d", "resnet200d"), Input(size=256, crop=0.95)),
    "resnet26t": Input(size=256, crop=0.94),
    **dict.fromkeys(("resnet10t", "resnet14t"), Input(size=176)),
}

NAMES = {
    "timm": [
        (r"^layer(\d)_(\d+)", r"layer\1.\2"),
        (r"^conv1_(\d)", r"conv1.\1"),
        (r"downsample_conv_bn", "downsample.1"),
        (r"downsample_avg_bn", "downsample.2"),
        (r"downsample_conv", "downsample.0"),
        (r"downsample_avg", "downsample.1"),
    ]
}
