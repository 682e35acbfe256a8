"""Every family of networks at a size that compiles in a moment, under the name of one of its variants."""

import pytest

from research import backbones

_STAGES = {"stages": (("ds_c8",), ("ir_k5_s2_e2_c8_se0.25",)), "stem": 8, "head": 8}
_GHOSTS = (((3, 4, 16, 0, 1), (3, 4, 16, 0, 1), (3, 8, 16, 0.25, 1)), ((3, 16, 12, 0.25, 2),))
_ROWS = (((3, 8, 8, 0, 1),), ((3, 16, 12, 0.25, 2),))
_TOKENS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
_WINDOWS = {"img_size": 28, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4), "window_size": 3}

# Variant, and what is changed in it. Where `img_size` is given, it is the size of the images.
TINY = {
    "resnet": ("resnet50", {"layers": (1, 1), "channels": (4, 8), "stem_width": 4}),
    "resnet_v2": ("resnetv2_50x1_bit", {"layers": (1, 1), "channels": (16, 16), "stem_chs": 8, "groupnorm_groups": 2}),
    "cifar_resnet": ("resnet8", {"layers": (1, 1), "channels": (4, 8), "stem_width": 4}),
    "cifar_wrn": ("wrn_16_1", {"depth": 10}),
    "cifar_vgg": ("vgg8", {"channels": (4, 4, 8, 8, 8)}),
    "vit": ("deit_tiny_distilled_patch16_224", _TOKENS),
    "lvvit": ("lvvit_t", {**_TOKENS, "stem_width": 4}),
    "clip": (
        "clip_vit_b32_full",
        _TOKENS
        | {"hidden": 32, "vocabulary": 16, "context": 5}
        | {"text_width": 8, "text_depth": 1, "text_heads": 1, "text_hidden": 16},
    ),
    "beit": ("beitv2_base_patch16_224", _TOKENS),
    "convnext": ("convnextv2_atto", {"depths": (1, 1), "dims": (8, 16)}),
    "mixer": ("resmlp_12_224", {"img_size": 16, "patch_size": 8, "embed_dim": 8, "num_blocks": 2}),
    "swin": ("swin_pico_patch4_window7_224", _WINDOWS),
    "swin_v2": ("swinv2_tiny_window8_256", _WINDOWS),
    "mobilenet": ("mobilenetv2_100", {"stages": (("ds_c8",), ("ir_s2_e6_c8",)), "stem": 8, "head": 24}),
    "mobilenet_v3": ("mobilenetv3_large_100", {**_STAGES, "stages": (("ir_s2_e2_c8_se0.25",), ("cn_k1_c16",))}),
    "efficientnet": ("tf_efficientnet_b0", _STAGES),
    "ghostnet": ("ghostnetv2_100", {"cfgs": _GHOSTS, "head": 8}),
    "bimlp": ("bimlp_s", {"layers": (1,), "embed_dims": (8,)}),
    "vanillanet": ("vanillanet_5", {"dims": (8, 12, 16), "strides": (2, 1), "act_num": 1}),
    "parameternet": ("parameternet_300m_experts2", {"cfgs": _ROWS, "width": 0.5, "head": 8}),
}
SIZE = 32


def side(family: str) -> int:
    """Side of the images of a family's tiny network."""
    return TINY[family][1].get("img_size", SIZE)


def use(monkeypatch: pytest.MonkeyPatch, family: str, num_classes: int = 7) -> str:
    """Makes a variant of the family tiny wherever it is built by its name, its merged form too; returns the name."""
    name, options = TINY[family]
    module = backbones.family(name)
    for key in (name, f"{name}_deploy"):
        if key in module.VARIANTS:
            monkeypatch.setitem(module.VARIANTS, key, {**module.VARIANTS[key], **options, "num_classes": num_classes})
    monkeypatch.setattr(module, "INPUTS", {name: backbones.input_spec(name)._replace(size=side(family))}, raising=False)
    return name
