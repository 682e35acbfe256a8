"""Golden checks of the standard backbones against timm."""

import re

import jax.numpy as jnp

from research.backbones import convnext, efficientnet, ghostnet, mobilenet_v3, resnet, resnet_v2
from research.port.checks import common, transformers
from research.port.names import to_official
from research.port.verify import Golden

# Arguments that change nothing in the forward pass of a golden, or only state the default.
NEUTRAL = {"in_chans", "global_pool", "img_size", "drop_path_rate", "drop_rate", "zero_init_last"}


def arguments(golden: Golden, drop: set[str] = NEUTRAL) -> dict:
    """The official constructor's arguments, which have the same names here; computing in float64."""
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in golden.kwargs.items() if k not in drop}
    return {**kept, "dtype": jnp.float64}


def _resnet(golden: Golden) -> resnet.ResNet:
    kwargs = arguments(golden)
    kwargs.setdefault("block", "basic" if "layer1.0.conv3.weight" not in golden.w else "bottleneck")
    kwargs["block"] = re.sub(r"block$", "", str(kwargs["block"]).rsplit(".", 1)[-1].lower())
    return resnet.build(**kwargs)


def _resnet_endpoint(module: str) -> str:
    return {"bn1": "stem_preact", "act1": "stem"}.get(module) or re.sub(r"^layer(\d)$", r"stage\1", module)


def check_resnet(golden: Golden) -> dict:
    return common.run(golden, resnet, _resnet(golden), _resnet_endpoint)[0]


def check_resnet_train(golden: Golden) -> dict:
    """One forward pass with batch statistics; `buf.*` are the running statistics after it."""
    outputs, _, updates = common.run(golden, resnet, _resnet(golden), _resnet_endpoint, train=True)
    return outputs | {f"buf.{name}": value for name, value in to_official(updates, resnet.NAMES["timm"]).items()}


def check_convnext(golden: Golden) -> dict:
    endpoint = lambda module: re.sub(r"^stages\.(\d)$", lambda found: f"stage{int(found[1]) + 1}", module)
    return common.run(golden, convnext, convnext.build(**arguments(golden)), endpoint)[0]


def _mobile(golden: Golden, family) -> dict:
    """Networks of timm's block notation; first and last convolution have the widths the weights show."""
    kwargs = golden.kwargs
    model = family.build(
        stages=tuple(tuple(rows) for rows in kwargs["arch_def"]),
        width=kwargs.get("channel_multiplier", 1.0),
        stem=golden.w["conv_stem.weight"].shape[0],
        head=golden.w["conv_head.weight"].shape[0],
        act={"swish": "silu"}.get(kwargs["act"], kwargs["act"]),
        pad_type=kwargs.get("pad_type", ""),
        bn_eps=kwargs.get("bn_eps", 1e-5),
        num_classes=golden.w["classifier.weight"].shape[0],
        dtype=jnp.float64,
    )
    return common.run(golden, family, model, lambda module: module)[0]


def check_efficientnet(golden: Golden) -> dict:
    return _mobile(golden, efficientnet)


def check_mobilenetv3(golden: Golden) -> dict:
    return _mobile(golden, mobilenet_v3)


def check_ghostnet(golden: Golden) -> dict:
    kwargs = {k: v for k, v in arguments(golden).items() if k not in ("head_channels", "note")}
    cfgs = tuple(tuple(tuple(row) for row in rows) for rows in kwargs.pop("cfgs"))
    model = ghostnet.build(cfgs=cfgs, head=golden.w["conv_head.weight"].shape[0], **kwargs)
    last = f"blocks.{len(cfgs)}"
    return common.run(golden, ghostnet, model, lambda module: "features" if module == last else module)[0]


def check_resnet_v2(golden: Golden) -> dict:
    """The weight standardisation is written as `StdConv2d(eps=1e-8)`."""
    kwargs = arguments(golden, NEUTRAL | {"conv", "stem_type"})
    stated = re.search(r"eps=([\d.e+-]+)", golden.kwargs.get("conv", ""))
    model = resnet_v2.build(**kwargs, **({"conv_eps": float(stated[1])} if stated else {}))
    names = {"stem": "stem_pooled", "stem.conv": "stem"}
    stage = lambda found: f"stage{int(found[1]) + 1}"
    endpoint = lambda module: names.get(module) or re.sub(r"^stages\.(\d+)$", stage, module)
    return common.run(golden, resnet_v2, model, endpoint)[0]


CHECKS = {
    "resnet_basic": check_resnet,
    "resnet_bottleneck": check_resnet,
    "resnet_d": check_resnet,
    "resnet_train_mode": check_resnet_train,
    "resnetv2_bit": check_resnet_v2,
    "convnext": check_convnext,
    "convnextv2": check_convnext,
    "mobilenetv2": check_efficientnet,
    "mobilenetv3": check_mobilenetv3,
    "efficientnet": check_efficientnet,
    "efficientnet_tf": check_efficientnet,
    "ghostnetv1": check_ghostnet,
    "ghostnetv2": check_ghostnet,
    "vit": transformers.check_vit,
    "deit_distilled": transformers.check_deit_distilled,
    "deit3": transformers.check_vit,
    "vit_clip_image_tower": transformers.check_clip_tower,
    "clip_full": transformers.check_clip,
    "beitv2": transformers.check_beit,
    "swin": transformers.check_swin,
    "swinv2": transformers.check_swin_v2,
    "mixer": transformers.check_mixer,
    "resmlp": transformers.check_resmlp,
}
