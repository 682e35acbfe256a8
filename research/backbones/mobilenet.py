"""MobileNetV2: inverted residuals with linear bottlenecks.

Source: Sandler et al. 2018 (arXiv 1801.04381), tables 1 and 2. It is an `EfficientNet` without squeeze-excite and with
ReLU6, in timm as here. Official names and widths are timm's.
"""

import math

from research.backbones.efficientnet import NAMES, EfficientNet
from research.backbones.efficientnet import build as efficientnet
from research.layers.mobile import round_width

__all__ = ["GROUPS", "NAMES", "VARIANTS", "build"]

# (expansion, channels, repeats, stride) of each stage; without expansion its blocks are depthwise-separable.
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def stages(groups: tuple[tuple[int, int, int, int], ...] = GROUPS, depth: float = 1.0) -> tuple[tuple[str, ...], ...]:
    """The `stages` of the network from (expansion, channels, repeats, stride) of each.

    `depth` multiplies the blocks of all stages but the first and the last.
    """
    ends = (0, len(groups) - 1)
    repeats = [n if index in ends else math.ceil(depth * n) for index, (_, _, n, _) in enumerate(groups)]
    return tuple(
        (f"{'ir' if t > 1 else 'ds'}_r{n}_k3_s{s}_e{t}_c{c}",) for n, (t, c, _, s) in zip(repeats, groups, strict=True)
    )


def build(**arguments) -> EfficientNet:
    """The module; see `EfficientNet` for the arguments, of which `stages` and `act` default to MobileNetV2's."""
    return efficientnet(**{"stages": stages(), "act": "relu6", **arguments})


_WIDTHS = {"035": 0.35, "050": 0.5, "075": 0.75, "100": 1.0, "140": 1.4}

VARIANTS = {
    **{
        f"mobilenetv2_{name}": {
            "width": width,
            "stem": round_width(32 * width),
            "head": max(1280, round_width(1280 * width)),
        }
        for name, width in _WIDTHS.items()
    },
    # Deeper ones, whose first and last convolution stay as they are.
    "mobilenetv2_110d": {"width": 1.1, "stages": stages(depth=1.2)},
    "mobilenetv2_120d": {"width": 1.2, "stages": stages(depth=1.4)},
}
