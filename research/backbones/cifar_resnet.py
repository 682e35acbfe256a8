"""The ResNets of the distillation literature on CIFAR: three stages for images of 32 pixels, and ResNet-18/34/50.

Sources: He et al. 2016, section 4.2 (depth 6n + 2); Tian et al. 2020 (the x4 widths). Official names are mdistiller's:
its `resnet.py` (first dialect) and `resnetv2.py` (dialect `shortcut`, of the `cifar_resnet18/34/50` here).
"""

from research.backbones import Input
from research.backbones.resnet import NAMES as _IMAGENET_NAMES
from research.backbones.resnet import ResNet
from research.backbones.resnet import build as _build

CIFAR100 = Input(size=32, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), crop=1.0)


def build(**arguments) -> ResNet:
    """A `ResNet` with the small stem, 100 classes unless said otherwise, and no zero-initialised scale."""
    return _build(**{"num_classes": 100, "stem_type": "small", "zero_init_last": False, **arguments})


def _three_stages(depth: int, stem: int, first: int) -> dict:
    blocks = (depth - 2) // 6
    return {"block": "basic", "layers": (blocks,) * 3, "channels": (first, 2 * first, 4 * first), "stem_width": stem}


VARIANTS = {
    **{f"resnet{depth}": _three_stages(depth, 16, 16) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": _three_stages(8, 32, 64),
    "resnet32x4": _three_stages(32, 32, 64),
    "cifar_resnet18": {"block": "basic", "layers": (2, 2, 2, 2)},
    "cifar_resnet34": {"block": "basic", "layers": (3, 4, 6, 3)},
    "cifar_resnet50": {"block": "bottleneck", "layers": (3, 4, 6, 3)},
}

INPUTS = dict.fromkeys(VARIANTS, CIFAR100)

NAMES = {
    "mdistiller": _IMAGENET_NAMES["timm"],
    "shortcut": [*_IMAGENET_NAMES["timm"], (r"downsample", "shortcut"), (r"^fc", "linear")],
}
