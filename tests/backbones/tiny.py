"""Every family of networks at a size that compiles in a moment, in every form that differs in what is compiled."""

from typing import NamedTuple

import pytest

from research import backbones

TOKENS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "depth": 2, "drop_path": 0.2}
WINDOWS = {"img_size": (28, 20), "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4), "window_size": 3}
MIXER = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_blocks": 1, "drop_rate": 0.2}
BIMLP = {"layers": (1,), "embed_dims": (8,)}
VANILLA = {"dims": (8, 8, 16), "strides": (2, 1), "act_num": 1, "drop_rate": 0.2}
PARAMETER = {"cfgs": (((3, 8, 16, 0.25, 2),),), "width": 1.0, "head": 8}


class Form(NamedTuple):
    """A published variant and what makes it small; `trains`: whether it stands for its family."""

    variant: str
    options: dict
    trains: bool = True


# The first word is the family. Where `img_size` is given, it is the size of the images.
FORMS = {
    "resnet": Form("resnet50d", {"layers": (1,), "channels": (8,), "stem_width": 8, "drop_rate": 0.2}),
    "resnet_v2": Form(
        "resnetv2_50x1_bit",
        {"layers": (1,), "channels": (16,), "stem_chs": 8, "groupnorm_groups": 2, "drop_rate": 0.2},
    ),
    "cifar_resnet": Form("resnet20", {"layers": (1,), "channels": (16,), "stem_width": 8, "drop_rate": 0.2}),
    "cifar_wrn": Form("wrn_16_1", {"depth": 10, "drop_rate": 0.2}),
    "cifar_vgg": Form("vgg8", {"channels": (8, 8, 8, 8, 16)}),
    "vit distilled": Form("deit_tiny_distilled_patch16_224", TOKENS),
    "vit deit3": Form("deit3_small_patch16_224", {**TOKENS, "init_values": 0.5}, trains=False),
    "vit clip": Form("vit_base_patch32_clip_quickgelu_224", TOKENS, trains=False),
    "lvvit": Form("lvvit_t", {**TOKENS, "depth": 1, "stem_width": 8, "drop_rate": 0.2}),
    "clip": Form(
        "clip_vit_b32_full",
        {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "hidden": 32, "vocabulary": 16}
        | {"context": 5, "text_width": 8, "text_depth": 1, "text_heads": 1, "text_hidden": 16},
    ),
    "beit": Form("beit_base_patch16_224", {**TOKENS, "depth": 1, "drop_rate": 0.2}),
    "convnext": Form("convnext_tiny", {"depths": (1,), "dims": (8,), "ls_init_value": 0.5, "drop_rate": 0.2}),
    "convnext v2": Form("convnextv2_tiny", {"depths": (1,), "dims": (8,), "drop_path": 0.0}, trains=False),
    "mixer": Form("mixer_s32_224", MIXER),
    "mixer resmlp": Form("resmlp_12_224", {**MIXER, "init_values": 0.5}, trains=False),
    "swin": Form("swin_tiny_patch4_window7_224", {**WINDOWS, "depths": (2,), "num_heads": (2,), "drop_path": 0.2}),
    "swin_v2": Form("swinv2_tiny_window8_256", {**WINDOWS, "depths": (2,), "num_heads": (2,), "drop_path": 0.2}),
    "mobilenet": Form(
        "mobilenetv2_100", {"stages": (("ds_c8",), ("ir_r1_s2_e2_c16",)), "stem": 8, "head": 8, "drop_rate": 0.2}
    ),
    "mobilenet_v3": Form(
        "mobilenetv3_large_100",
        {"stages": (("ir_s2_e2_c8_se0.25",), ("cn_k1_c16",)), "stem": 8, "head": 8, "drop_rate": 0.2},
    ),
    "efficientnet same padding": Form(
        "tf_efficientnet_b0", {"stages": (("ir_k5_s2_e2_c8_se0.25",),), "stem": 8, "head": 8, "drop_rate": 0.2}
    ),
    "ghostnet": Form("ghostnet_100", {"cfgs": (((3, 8, 16, 0.25, 2),),), "head": 8}, trains=False),
    "ghostnet v2": Form("ghostnetv2_100", {"cfgs": (((3, 4, 16, 0, 1), (3, 4, 16, 0, 1)),), "head": 8}),
    "bimlp ternary": Form("bimlp_s", BIMLP),
    "bimlp sign": Form("bimlp_m", {**BIMLP, "activation": "sign"}, trains=False),
    "vanillanet": Form("vanillanet_5", VANILLA),
    "vanillanet deploy": Form("vanillanet_5_deploy", VANILLA, trains=False),
    "vanillanet ada_pool": Form("vanillanet_13_x1_5_ada_pool", {**VANILLA, "ada_pool": (6, 0)}, trains=False),
    "parameternet": Form("parameternet_300m", {**PARAMETER, "remat": True}),
    "parameternet plain": Form("ghostnet_300m", PARAMETER, trains=False),
}
SIZE = 32


def square(family: str) -> tuple[str, dict, int]:
    """(variant, options, side of the images) of the form that stands for a family, for square images."""
    variant, options, _ = next(form for name, form in FORMS.items() if form.trains and name.split()[0] == family)
    if "img_size" not in options:
        return variant, options, SIZE
    size = options["img_size"]
    side = size if isinstance(size, int) else max(size)
    return variant, {**options, "img_size": side}, side


def use(monkeypatch: pytest.MonkeyPatch, family: str, num_classes: int = 7) -> tuple[str, int]:
    """Makes a variant of the family tiny where it is built by name, its merged form too; (name, side of images)."""
    name, options, side = square(family)
    module = backbones.family(name)
    for key in (name, f"{name}_deploy"):
        if key in module.VARIANTS:
            monkeypatch.setitem(module.VARIANTS, key, {**module.VARIANTS[key], **options, "num_classes": num_classes})
    monkeypatch.setattr(module, "INPUTS", {name: backbones.input_spec(name)._replace(size=side)}, raising=False)
    return name, side
