"""VGG with batch norm for CIFAR: five blocks of 3x3 convolutions and one linear classifier.

Sources: Simonyan & Zisserman 2015; Tian et al. 2020 (the CIFAR form). Official names are mdistiller's `vgg.py`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones.cifar_resnet import CIFAR100
from research.layers.init import kaiming_fan_out
from research.layers.norm import BatchNorm
from research.layers.pool import global_mean, max_pool


class VGG(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields:
      layers, channels: convolutions and width of each of the five blocks.
      bn_group: examples a batch-norm group, None for the global batch.

    Endpoints: `stem` is the first block, `stage1`..`stage4` the others, each with `_preact` before its last ReLU; and
    `pooled`. Maps are halved between blocks, before the last block only where images are 64 pixels high.
    """

    layers: tuple[int, ...] = (1, 1, 1, 1, 1)
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    num_classes: int = 100
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = images.astype(self.dtype)
        halved_last = images.shape[1] == 64
        endpoints = {}
        for block, (depth, features) in enumerate(zip(self.layers, self.channels, strict=True)):
            if 0 < block < len(self.layers) - 1 or (block and halved_last):
                x = max_pool(x, 2, 2, 0)
            for index in range(depth):
                # Official names count convolution, norm and activation.
                layer, norm = f"block{block}_{3 * index}", f"block{block}_{3 * index + 1}"
                x = nn.Conv(
                    features,
                    (3, 3),
                    padding=((1, 1), (1, 1)),
                    kernel_init=kaiming_fan_out,
                    dtype=self.dtype,
                    name=layer,
                )(x)
                preact = BatchNorm(group=self.bn_group, dtype=self.dtype, name=norm)(x, train)
                x = nn.relu(preact)
            stage = f"stage{block}" if block else "stem"
            endpoints |= {stage: x, f"{stage}_preact": preact}
        pooled = endpoints["pooled"] = global_mean(x)
        if self.num_classes == 0:
            return pooled, endpoints
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.num_classes, kernel_init=init, dtype=self.dtype, name="classifier")(pooled), endpoints


def build(**arguments) -> VGG:
    """The module; see `VGG` for the arguments."""
    return VGG(**arguments)


VARIANTS = {
    "vgg8": {"layers": (1, 1, 1, 1, 1)},
    "vgg11": {"layers": (1, 1, 2, 2, 2)},
    "vgg13": {"layers": (2, 2, 2, 2, 2)},
    "vgg16": {"layers": (2, 2, 3, 3, 3)},
    "vgg19": {"layers": (2, 2, 4, 4, 4)},
}

INPUTS = dict.fromkeys(VARIANTS, CIFAR100)

NAMES = {"mdistiller": [(r"^block(\d)_(\d+)", r"block\1.\2")]}
