"""GhostNet and GhostNetV2: half of the channels of every pointwise convolution come from a cheap depthwise one.

Sources: Han et al. 2020 (arXiv 1911.11907), table 1; Tang et al. 2022 (V2, arXiv 2211.12905). Arguments and official
names are timm's, which are also the authors'.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.layers.drop import Dropout
from research.layers.init import torch_bias, torch_linear
from research.layers.mobile import SqueezeExcite, conv, depthwise, round_width
from research.layers.norm import BatchNorm, accumulation_dtype
from research.layers.patch_embed import torch_conv
from research.layers.pool import global_mean
from research.layers.remat import rematerialised

# Stages of blocks (kernel, expanded channels, channels, squeeze-excite ratio, stride).
CFGS = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    ((3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 0.25, 1), (3, 672, 112, 0.25, 1)),
    ((5, 672, 160, 0.25, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)),
)

pointwise = functools.partial(conv, size=1, kernel_init=torch_conv)
separate = functools.partial(depthwise, kernel_init=torch_conv)


class Ghost(nn.Module):
    """A ghost module: (B, H, W, C) -> (B, H, W, features).

    A pointwise convolution makes half of the channels, a depthwise one of these the other half (paper, equations 1-3).

    Fields:
      relu: both halves end in a ReLU.
      attention: V2's long-range attention: the channels are weighted by a map of half the resolution, made by a row and
        a column of depthwise weights (V2, equations 4 and 5; made smaller as in section 3.3).
    """

    features: int
    relu: bool = True
    attention: bool = False
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        half = math.ceil(self.features / 2)
        act = nn.relu if self.relu else lambda y: y
        first = act(self._normed("primary_conv", 0, pointwise(half, dtype=self.dtype, name="primary_conv_0")(x), train))
        cheap = separate(half, 3, dtype=self.dtype, name="cheap_operation_0")(first)
        second = act(self._normed("cheap_operation", 0, cheap, train))
        # An odd number of features leaves one channel over.
        y = jnp.concatenate([first, second], axis=-1)[..., : self.features]
        return y * self._attention(x, train) if self.attention else y

    def _attention(self, x: jax.Array, train: bool) -> jax.Array:
        size, features = x.shape[1:3], self.features
        if min(size) < 2:
            raise ValueError(f"attention over a {size[0]}x{size[1]} map: GhostNetV2 takes images of 33 pixels or more")
        total = nn.pooling.pool(x.astype(accumulation_dtype(x)), 0.0, jax.lax.add, (2, 2), (2, 2), "VALID")
        y = pointwise(features, dtype=self.dtype, name="short_conv_0")((total / 4).astype(self.dtype))
        y = self._normed("short_conv", 0, y, train)
        for index, kernel in ((2, (1, 5)), (4, (5, 1))):
            y = separate(features, kernel, dtype=self.dtype, name=f"short_conv_{index}")(y)
            y = self._normed("short_conv", index, y, train)
        y = nn.sigmoid(y)
        for axis, side in zip((1, 2), size, strict=True):
            nearest = np.arange(side) * y.shape[axis] // side
            y = jnp.take(y, nearest, axis=axis, mode="clip")
        return y

    def _normed(self, name: str, index: int, y: jax.Array, train: bool) -> jax.Array:
        return BatchNorm(group=self.bn_group, dtype=self.dtype, name=f"{name}_{index + 1}")(y, train)


class Block(nn.Module):
    """Two ghost modules around an optional strided convolution: (B, H, W, C) -> (B, H/stride, W/stride, features).

    Fields:
      width: channels between the modules.
      kernel: side of the depthwise kernels of the stride and of the shortcut.
      squeeze: width of the squeeze-excite over `width`, 0 for none.
      attention: see `Ghost`, of the first module.
    """

    width: int
    features: int
    kernel: int = 3
    stride: int = 1
    squeeze: float = 0.0
    attention: bool = False
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shared = {"bn_group": self.bn_group, "dtype": self.dtype}
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        strided = functools.partial(separate, size=self.kernel, stride=self.stride, dtype=self.dtype)
        y = Ghost(self.width, attention=self.attention, name="ghost1", **shared)(x, train)
        if self.stride > 1:
            y = norm(name="bn_dw")(strided(self.width, name="conv_dw")(y), train)
        if self.squeeze:
            width = round_width(self.width * self.squeeze, 4)
            options = {"gate": nn.hard_sigmoid, "kernel_init": torch_conv, "dtype": self.dtype}
            y = SqueezeExcite(width, name="se", **options)(y)
        y = Ghost(self.features, relu=False, name="ghost2", **shared)(y, train)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = norm(name="shortcut_1")(strided(x.shape[-1], name="shortcut_0")(x), train)
            x = norm(name="shortcut_3")(pointwise(self.features, dtype=self.dtype, name="shortcut_2")(x), train)
        return x + y


class GhostNet(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm unless noted:
      cfgs: stages of blocks, see `CFGS`.
      width: factor on all channels but those of the head.
      version: `v1`, or `v2` with attention from the third block on.
      head: channels of the last convolution, which comes after the pooling (in timm a constant).
      drop_rate: dropout before the classifier.
      bn_group: examples a batch-norm group, None for the global batch.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `stage1`.. (the last block at each resolution from a quarter on), `features` (the map that is
    pooled), `pooled` (what the classifier sees, after the last convolution). With `num_classes` 0 the logits are the
    pooled features.
    """

    cfgs: tuple[tuple[tuple[float, ...], ...], ...] = CFGS
    width: float = 1.0
    version: str = "v1"
    head: int = 1280
    num_classes: int = 1000
    drop_rate: float = 0.2
    bn_group: int | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        stem = conv(round_width(16 * self.width, 4), 3, 2, kernel_init=torch_conv, dtype=self.dtype, name="conv_stem")
        x = nn.relu(norm(name="bn1")(stem(images.astype(self.dtype)), train))
        endpoints, halvings, count = {"stem": x}, 0, 0

        block = rematerialised(Block, self.remat)
        for stage, rows in enumerate(self.cfgs):
            for index, (kernel, expanded, channels, squeeze, stride) in enumerate(rows):
                x = block(
                    width=round_width(expanded * self.width, 4),
                    features=round_width(channels * self.width, 4),
                    kernel=kernel,
                    stride=stride,
                    squeeze=squeeze,
                    attention=self.version == "v2" and count > 1,
                    bn_group=self.bn_group,
                    dtype=self.dtype,
                    name=f"blocks_{stage}_{index}",
                )(x, train)
                halvings, count = halvings + (stride > 1), count + 1
            if halvings:
                endpoints[f"stage{halvings}"] = x

        # The last stage is one convolution as wide as the last block inside.
        name, features = f"blocks_{len(self.cfgs)}_0", round_width(self.cfgs[-1][-1][1] * self.width, 4)
        x = nn.relu(norm(name=f"{name}_bn1")(pointwise(features, dtype=self.dtype, name=f"{name}_conv")(x), train))
        endpoints["features"] = x
        last = pointwise(self.head, use_bias=True, bias_init=torch_bias(features), dtype=self.dtype, name="conv_head")
        pooled = endpoints["pooled"] = nn.relu(last(global_mean(x)[:, None, None, :]))[:, 0, 0]
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        return torch_linear(self.num_classes, self.head, dtype=self.dtype, name="classifier")(x), endpoints


def build(**arguments) -> GhostNet:
    """The module; see `GhostNet` for the arguments.

    Raises:
      ValueError: another version than `v1` and `v2`.
    """
    model = GhostNet(**arguments)
    if model.version not in ("v1", "v2"):
        raise ValueError(f"version: {model.version!r} is neither 'v1' nor 'v2'")
    return model


VARIANTS = {
    "ghostnet_050": {"width": 0.5},
    "ghostnet_100": {"width": 1.0},
    "ghostnet_130": {"width": 1.3},
    "ghostnetv2_100": {"width": 1.0, "version": "v2"},
    "ghostnetv2_130": {"width": 1.3, "version": "v2"},
    "ghostnetv2_160": {"width": 1.6, "version": "v2"},
}

NAMES = {
    "timm": [
        (r"^blocks_(\d+)_(\d+)_(conv|bn1)", r"blocks.\1.\2.\3"),
        (r"^blocks_(\d+)_(\d+)", r"blocks.\1.\2"),
        (r"\.(primary_conv|cheap_operation|short_conv|shortcut)_(\d)", r".\1.\2"),
    ]
}

# What a counter of operations left in the authors' files.
IGNORED = (r"(^|\.)total_(ops|params)$",)
