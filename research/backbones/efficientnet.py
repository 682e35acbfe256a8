"""EfficientNet: inverted residuals with squeeze-excite, scaled in width, depth and resolution together.

Source: Tan & Le 2019 (arXiv 1905.11946), table 1. `tf_` variants compute what the TensorFlow weights were trained for:
padding by TensorFlow's rule and another epsilon. Arguments and official names are timm's.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import HALF, Input
from research.layers.drop import Dropout
from research.layers.mobile import ACTIVATIONS, checked, classifier_init, conv, round_width, row, trunk
from research.layers.norm import BatchNorm
from research.layers.pool import global_mean

# (expansion, kernel, channels, repeats, stride) of each stage; without expansion its blocks are depthwise-separable.
B0 = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)


class EfficientNet(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields:
      stages: rows of blocks of each stage in timm's notation, see `research.layers.mobile.Row`.
      width: factor on the channels of all blocks.
      stem, head: channels of the first and of the last convolution.
      act: key of `research.layers.mobile.ACTIVATIONS`.
      pad_type: "" (symmetric) or `same` (TensorFlow's).
      bn_eps: of the batch norms.
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      bn_group: examples a batch-norm group, None for the global batch.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `stage1`.. (the last block at each resolution from a quarter on), `features` (the last
    convolution's map), `pooled`. With `num_classes` 0 the logits are the pooled features.
    """

    stages: tuple[tuple[str, ...], ...]
    width: float = 1.0
    stem: int = 32
    head: int = 1280
    act: str = "silu"
    pad_type: str = ""
    bn_eps: float = 1e-5
    num_classes: int = 1000
    drop_rate: float = 0.0
    drop_path: float = 0.0
    bn_group: int | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        same, shared = self.pad_type == "same", {"epsilon": self.bn_eps, "dtype": self.dtype}
        x, endpoints = trunk(
            images,
            train,
            [[row(text) for text in rows] for rows in self.stages],
            stem=self.stem,
            width=self.width,
            act=self.act,
            drop_path=self.drop_path,
            remat=self.remat,
            same=same,
            bn_group=self.bn_group,
            **shared,
        )
        x = conv(self.head, 1, dtype=self.dtype, name="conv_head")(x)
        x = ACTIVATIONS[self.act](BatchNorm(group=self.bn_group, name="bn2", **shared)(x, train))
        endpoints["features"] = x
        pooled = endpoints["pooled"] = global_mean(x)
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=classifier_init, name="classifier")
        return head(x), endpoints


def build(**arguments) -> EfficientNet:
    """The module; see `EfficientNet` for the arguments.

    Raises:
      ValueError: an unknown padding, activation or block.
    """
    model = EfficientNet(**arguments)
    checked(model.stages, model.act, model.pad_type)
    return model


def _scaled(width: float, depth: float) -> dict:
    """Arguments of the network with `width` times the channels and `depth` times the blocks of B0."""
    stages = tuple(
        (f"{'ir' if t > 1 else 'ds'}_r{math.ceil(depth * n)}_k{k}_s{s}_e{t}_c{c}_se0.25",) for t, k, c, n, s in B0
    )
    return {"stages": stages, "width": width, "stem": round_width(32 * width), "head": round_width(1280 * width)}


# Factors of width and depth, side of the images (of timm's own recipes, and of TensorFlow's), and TensorFlow's crop.
_SIZES = {
    "b0": (1.0, 1.0, 224, 224, 0.875),
    "b1": (1.0, 1.1, 240, 240, 0.882),
    "b2": (1.1, 1.2, 256, 260, 0.89),
    "b3": (1.2, 1.4, 288, 300, 0.904),
    "b4": (1.4, 1.8, 320, 380, 0.922),
    "b5": (1.6, 2.2, 448, 456, 0.934),
    "b6": (1.8, 2.6, 528, 528, 0.942),
    "b7": (2.0, 3.1, 600, 600, 0.949),
}
_TF = {"pad_type": "same", "bn_eps": 1e-3}

VARIANTS = {
    **{f"efficientnet_{size}": _scaled(width, depth) for size, (width, depth, *_) in _SIZES.items()},
    **{f"tf_efficientnet_{size}": {**_scaled(width, depth), **_TF} for size, (width, depth, *_) in _SIZES.items()},
}

INPUTS = {
    **{f"efficientnet_{size}": Input(size=side) for size, (_, _, side, _, _) in _SIZES.items()},
    "efficientnet_b1": Input(size=240, mean=HALF, std=HALF, crop=0.9),
    "efficientnet_b5": Input(size=448, crop=1.0),
    "efficientnet_b6": Input(size=528, crop=0.942),
    "efficientnet_b7": Input(size=600, crop=0.949),
    **{f"tf_efficientnet_{size}": Input(size=side, crop=crop) for size, (_, _, _, side, crop) in _SIZES.items()},
}

NAMES = {"timm": [(r"^blocks_(\d+)_(\d+)", r"blocks.\1.\2")]}
