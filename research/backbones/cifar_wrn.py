"""Wide residual networks for CIFAR, with pre-activation blocks.

Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146). Official names are mdistiller's `wrn.py`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones.cifar_resnet import CIFAR100
from research.backbones.resnet import conv
from research.layers.drop import Dropout
from research.layers.init import torch_linear
from research.layers.norm import BatchNorm
from research.layers.pool import global_mean
from research.layers.remat import rematerialised


class Block(nn.Module):
    """Pre-activation block: (B, H, W, C) -> (B, H/stride, W/stride, features), and the input after its first norm.

    Where the width changes, the shortcut starts from the activated input; else from the input itself.
    """

    features: int
    stride: int = 1
    drop_rate: float = 0.0
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        layer = functools.partial(conv, dtype=self.dtype)
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        preact = norm(name="bn1")(x, train)
        active = nn.relu(preact)
        y = layer(self.features, 3, self.stride, name="conv1")(active)
        y = nn.relu(norm(name="bn2")(y, train))
        y = Dropout(self.drop_rate)(y, train)
        y = layer(self.features, 3, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = layer(self.features, 1, self.stride, name="convShortcut")(active)
        return x + y, preact


class WideResNet(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields:
      depth: 6n + 4; widen_factor: width of the stages over 16, 32, 64.
      drop_rate: dropout inside the blocks.
      bn_group, remat: as in `research.backbones.resnet.ResNet`.

    Endpoints: `stem`, `stage1`..`stage3` are sums of the residual stream, without activation; `stage1_preact`.. the
    same after the batch norm that reads them, so `relu(stage1_preact)` is what the next stage sees; `pooled`.
    """

    depth: int = 16
    widen_factor: int = 1
    num_classes: int = 100
    drop_rate: float = 0.0
    bn_group: int | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = conv(16, 3, dtype=self.dtype, name="conv1")(images.astype(self.dtype))
        endpoints = {"stem": x}
        block = rematerialised(Block, self.remat)
        for stage in (1, 2, 3):
            for index in range((self.depth - 4) // 6):
                x, preact = block(
                    features=16 * self.widen_factor * 2 ** (stage - 1),
                    stride=2 if stage > 1 and index == 0 else 1,
                    drop_rate=self.drop_rate,
                    bn_group=self.bn_group,
                    dtype=self.dtype,
                    name=f"block{stage}_{index}",
                )(x, train)
                if index == 0 and stage > 1:
                    endpoints[f"stage{stage - 1}_preact"] = preact
            endpoints[f"stage{stage}"] = x
        preact = endpoints["stage3_preact"] = BatchNorm(group=self.bn_group, dtype=self.dtype, name="bn1")(x, train)
        pooled = endpoints["pooled"] = global_mean(nn.relu(preact))
        if self.num_classes == 0:
            return pooled, endpoints
        return torch_linear(self.num_classes, pooled.shape[-1], dtype=self.dtype, name="fc")(pooled), endpoints


def build(**arguments) -> WideResNet:
    """The module; see `WideResNet` for the arguments.

    Raises:
      ValueError: the depth is not 6n + 4.
    """
    model = WideResNet(**arguments)
    if model.depth < 10 or (model.depth - 4) % 6:
        raise ValueError(f"depth: {model.depth} is not 6n + 4 (10, 16, 22, 28, 40)")
    return model


VARIANTS = {
    f"wrn_{depth}_{widen_factor}": {"depth": depth, "widen_factor": widen_factor}
    for depth, widen_factor in ((16, 1), (16, 2), (40, 1), (40, 2), (28, 10))
}

INPUTS = dict.fromkeys(VARIANTS, CIFAR100)

NAMES = {"mdistiller": [(r"^block(\d)_(\d+)", r"block\1.layer.\2")]}
