"""MobileNetV3: hard swish, squeeze-excite in some blocks, and a head that pools before its last convolution.

Source: Howard et al. 2019 (arXiv 1905.02244), tables 1 and 2. `tf_` variants compute what the TensorFlow weights were
trained for: padding by TensorFlow's rule and another epsilon. Arguments and official names are timm's.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import HALF, Input
from research.layers.drop import Dropout
from research.layers.init import kaiming_fan_out
from research.layers.mobile import ACTIVATIONS, checked, classifier_init, round_width, row, trunk
from research.layers.pool import global_mean

SMALL = (
    ("ds_r1_k3_s2_e1_c16_se0.25_nre",),
    ("ir_r1_k3_s2_e4.5_c24_nre", "ir_r1_k3_s1_e3.67_c24_nre"),
    ("ir_r1_k5_s2_e4_c40_se0.25", "ir_r2_k5_s1_e6_c40_se0.25"),
    ("ir_r2_k5_s1_e3_c48_se0.25",),
    ("ir_r3_k5_s2_e6_c96_se0.25",),
    ("cn_r1_k1_s1_c576",),
)
LARGE = (
    ("ds_r1_k3_s1_e1_c16_nre",),
    ("ir_r1_k3_s2_e4_c24_nre", "ir_r1_k3_s1_e3_c24_nre"),
    ("ir_r3_k5_s2_e3_c40_se0.25_nre",),
    ("ir_r1_k3_s2_e6_c80", "ir_r1_k3_s1_e2.5_c80", "ir_r2_k3_s1_e2.3_c80"),
    ("ir_r2_k3_s1_e6_c112_se0.25",),
    ("ir_r3_k5_s2_e6_c160_se0.25",),
    ("cn_r1_k1_s1_c960",),
)
# Without squeeze-excite, hard swish and 5x5 kernels.
SMALL_MINIMAL = (
    ("ds_r1_k3_s2_e1_c16",),
    ("ir_r1_k3_s2_e4.5_c24", "ir_r1_k3_s1_e3.67_c24"),
    ("ir_r1_k3_s2_e4_c40", "ir_r2_k3_s1_e6_c40"),
    ("ir_r2_k3_s1_e3_c48",),
    ("ir_r3_k3_s2_e6_c96",),
    ("cn_r1_k1_s1_c576",),
)
LARGE_MINIMAL = (
    ("ds_r1_k3_s1_e1_c16",),
    ("ir_r1_k3_s2_e4_c24", "ir_r1_k3_s1_e3_c24"),
    ("ir_r3_k3_s2_e3_c40",),
    ("ir_r1_k3_s2_e6_c80", "ir_r1_k3_s1_e2.5_c80", "ir_r2_k3_s1_e2.3_c80"),
    ("ir_r2_k3_s1_e6_c112",),
    ("ir_r3_k3_s2_e6_c160",),
    ("cn_r1_k1_s1_c960",),
)


class MobileNetV3(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields:
      stages: rows of blocks of each stage in timm's notation, see `research.layers.mobile.Row`.
      width: factor on the channels of all blocks.
      stem: channels of the first convolution; `head`: of the one after the pooling.
      act: key of `research.layers.mobile.ACTIVATIONS`, for the blocks that name none.
      pad_type: "" (symmetric) or `same` (TensorFlow's).
      bn_eps: of the batch norms.
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      bn_group: examples a batch-norm group, None for the global batch.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `stage1`.. (the last block at each resolution from a quarter on), `features` (the map that is
    pooled), `pooled` (what the classifier sees, after the last convolution). With `num_classes` 0 the logits are the
    pooled features.
    """

    stages: tuple[tuple[str, ...], ...] = LARGE
    width: float = 1.0
    stem: int = 16
    head: int = 1280
    act: str = "hard_swish"
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
        x, endpoints = trunk(
            images,
            train,
            [[row(text) for text in rows] for rows in self.stages],
            stem=self.stem,
            width=self.width,
            act=self.act,
            drop_path=self.drop_path,
            remat=self.remat,
            hard_squeeze=True,
            same=self.pad_type == "same",
            epsilon=self.bn_eps,
            bn_group=self.bn_group,
            dtype=self.dtype,
        )
        endpoints["features"] = x
        last = nn.Conv(self.head, (1, 1), kernel_init=kaiming_fan_out, dtype=self.dtype, name="conv_head")
        x = last(global_mean(x)[:, None, None, :])
        pooled = endpoints["pooled"] = ACTIVATIONS[self.act](x)[:, 0, 0]
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=classifier_init, name="classifier")
        return head(x), endpoints


def build(**arguments) -> MobileNetV3:
    """The module; see `MobileNetV3` for the arguments.

    Raises:
      ValueError: an unknown padding, activation or block.
    """
    model = MobileNetV3(**arguments)
    checked(model.stages, model.act, model.pad_type)
    return model


def _variant(size: str, width: float, minimal: bool = False) -> dict:
    # Narrow networks keep their first convolution.
    options = {"width": width, "stem": 16 if width < 0.75 else round_width(16 * width)}
    options |= {"act": "relu"} if minimal else {}
    if size == "small":
        return {"stages": SMALL_MINIMAL if minimal else SMALL, "head": 1024, **options}
    return {"stages": LARGE_MINIMAL if minimal else LARGE, **options}


_TF = {"pad_type": "same", "bn_eps": 1e-3}
_TF_SIZES = {
    f"tf_mobilenetv3_{size}_{name}": {**_variant(size, width, "minimal" in name), **_TF}
    for size in ("small", "large")
    for name, width in (("075", 0.75), ("100", 1.0), ("minimal_100", 1.0))
}

VARIANTS = {
    "mobilenetv3_small_050": _variant("small", 0.5),
    "mobilenetv3_small_075": _variant("small", 0.75),
    "mobilenetv3_small_100": _variant("small", 1.0),
    "mobilenetv3_large_075": _variant("large", 0.75),
    "mobilenetv3_large_100": _variant("large", 1.0),
    **_TF_SIZES,
}

INPUTS = dict.fromkeys(_TF_SIZES, Input(mean=HALF, std=HALF))

NAMES = {"timm": [(r"^blocks_(\d+)_(\d+)", r"blocks.\1.\2")]}
