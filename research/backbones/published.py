"""Accuracies that the authors of networks state: claims to compare with, none of them measured here.

All are top-1 in percent on ImageNet-1K's validation images at the network's own size. What else the same table states
stands beside it, as it was rounded there: counts can be checked against ours, latencies are of the authors' machines.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One row of a published table.

    Fields:
      top1: in percent; source: where it was read.
      pretraining: what the network was trained on before ImageNet-1K, empty for nothing.
      params: millions; flops: billions of multiply-adds; both None where the table has none.
      latency: milliseconds an image on an A100 at batch 1 in PyTorch, None where the table has none.
    """

    top1: float
    source: str
    pretraining: str = ""
    params: float | None = None
    flops: float | None = None
    latency: float | None = None


_VANILLANET = "arXiv 2305.12972, README of the official code"
_SLIDES = "arXiv 2305.12972, slides of the official code"
_PARAMETERNET = "arXiv 2306.14525, figure in the official code"
_DEIT = "arXiv 2012.12877, README of the official code"
_VANILLANETS = {
    "5": (72.49, 15.5, 5.2, 1.61),
    "6": (76.36, 32.5, 6.0, 2.01),
    "7": (77.98, 32.8, 6.9, 2.27),
    "8": (79.13, 37.1, 7.7, 2.56),
    "9": (79.87, 41.4, 8.6, 2.91),
    "10": (80.57, 45.7, 9.4, 3.24),
    "11": (81.08, 50.0, 10.3, 3.59),
    "12": (81.55, 54.3, 11.1, 3.82),
    "13": (82.05, 58.6, 11.9, 4.26),
    "13_x1_5": (82.53, 127.8, 26.5, 7.83),
    "13_x1_5_ada_pool": (83.11, 127.8, 48.9, 9.72),
}

# Variant of research.backbones -> the row of its authors (or of the authors of the table that compares them). Counts of
# VanillaNets are those of the deploy form.
IMAGENET: dict[str, Published] = {
    **{
        f"vanillanet_{name}": Published(top1, _VANILLANET, params=params, flops=flops, latency=latency)
        for name, (top1, params, flops, latency) in _VANILLANETS.items()
    },
    "resnet18": Published(70.6, _SLIDES),
    "resnet34": Published(75.5, _SLIDES),
    "resnet50": Published(79.8, _SLIDES, latency=7.64),
    "mobilenetv3_small_100": Published(67.67, _SLIDES),
    "mobilenetv3_large_100": Published(74.04, _SLIDES),
    "swin_tiny_patch4_window7_224": Published(81.18, _SLIDES, latency=10.51),
    "convnextv2_nano": Published(81.2, _SLIDES, latency=6.85),
    "deit_tiny_patch16_224": Published(72.2, _DEIT, params=5),
    "deit_small_patch16_224": Published(79.9, _DEIT, params=22),
    "deit_base_patch16_224": Published(81.8, _DEIT, params=86),
    "bimlp_m": Published(71.56, "README of the official MindSpore code"),
    "ghostnet_300m": Published(76.3, _PARAMETERNET, flops=0.289),
    "ghostnet_600m": Published(78.6, _PARAMETERNET, flops=0.58),
    "parameternet_300m": Published(77.2, _PARAMETERNET, flops=0.298),
    "parameternet_600m": Published(79.0, _PARAMETERNET, flops=0.6),
}

# The same after training on ImageNet-22K.
PRETRAINED: dict[str, Published] = {
    name: Published(top1, _PARAMETERNET, "ImageNet-22K")
    for name, top1 in {
        "ghostnet_300m": 75.7,
        "ghostnet_600m": 78.3,
        "parameternet_300m": 79.1,
        "parameternet_600m": 81.6,
    }.items()
}
