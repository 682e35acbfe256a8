"""Backbones by name: one file a family, each with a table `VARIANTS` of the published sizes.

A family module exposes

    VARIANTS: dict[str, dict]            variant -> constructor arguments
    INPUTS: dict[str, Input]             variant -> what the published weights expect (missing: the default `Input()`)
    build(**arguments) -> nn.Module      the module; `num_classes`, `dtype`, `drop_path` … are overrides
    NAMES: dict[str, list]               rules between our parameter paths and official names (see research.port.names)
    IGNORED: list[str]                   patterns of official names that are buffers, no parameters (missing: none)

and its modules are called as `logits, endpoints = model.apply(variables, images, train=False)` with NHWC images.
"""

from typing import NamedTuple

from research.core.catalogue import Catalogue

FAMILIES = (
    "resnet",
    "resnet_v2",
    "cifar_resnet",
    "cifar_wrn",
    "cifar_vgg",
    "vit",
    "lvvit",
    "clip",
    "beit",
    "convnext",
    "mixer",
    "swin",
    "swin_v2",
    "mobilenet",
    "mobilenet_v3",
    "efficientnet",
    "ghostnet",
    "bimlp",
    "vanillanet",
    "parameternet",
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


class Input(NamedTuple):
    """What a network's published weights expect: side in pixels, mean and std of images in [0, 1], centre crop."""

    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875


_CATALOGUE = Catalogue(__name__, FAMILIES, "model", "python -m research.backbones lists all")
variants, family, create = _CATALOGUE.variants, _CATALOGUE.family, _CATALOGUE.create


def input_spec(name: str) -> Input:
    """What the published weights of variant `name` expect."""
    return getattr(family(name), "INPUTS", {}).get(name, Input())
