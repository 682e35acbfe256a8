"""Where each network comes from, and how far its numbers have been checked against those of the authors' code.

A variant's paper is that of the first pattern of its name. A family's checks are golden arrays, made by the official
implementation of small networks of the family; `python -m research.port.verify` compares with them.
"""

import fnmatch

# Patterns of variants as a shell's -> arXiv number, or other words where there is none.
PAPERS = {
    "resnetv2_*_bit": "1912.11370",
    "resnext*": "1611.05431",
    "wide_resnet*": "1605.07146",
    "resnet8x4": "1910.10699",  # widths of the distillation benchmarks
    "resnet32x4": "1910.10699",
    "resnet*[0-9]d": "1812.01187",
    "resnet*t": "timm",
    "resnet*": "1512.03385",
    "cifar_resnet*": "1512.03385",
    "wrn_*": "1605.07146",
    "vgg*": "1409.1556",
    "clip_*": "2103.00020",
    "vit_*_clip_*": "2103.00020",
    "vit_*": "2010.11929",
    "deit3_*": "2204.07118",
    "deit_*": "2012.12877",
    "lvvit_*": "2104.10858",
    "beitv2_*": "2208.06366",
    "beit_*": "2106.08254",
    "convnextv2_*": "2301.00808",
    "convnext_*": "2201.03545",
    "mixer_*": "2105.01601",
    "resmlp_*": "2105.03404",
    "swinv2_*": "2111.09883",
    "swin_*": "2103.14030",
    "mobilenetv2_*": "1801.04381",
    "*mobilenetv3_*": "1905.02244",
    "*efficientnet_*": "1905.11946",
    "ghostnetv2_*": "2211.12905",
    "ghostnet_*00m": "2306.14525",  # ParameterNet's static twins
    "ghostnet_*": "1911.11907",
    "bimlp_*": "2212.14158",
    "vanillanet_*": "2305.12972",
    "parameternet_*": "2306.14525",
}

# Family -> golden arrays of whole networks under tests/golden. The others are checked by parameters and MACs alone.
GOLDEN = {
    "resnet": (
        "backbones/resnet_basic",
        "backbones/resnet_bottleneck",
        "backbones/resnet_d",
        "backbones/resnet_train_mode",
    ),
    "resnet_v2": ("backbones/resnetv2_bit",),
    "cifar_resnet": ("kdlosses/cifar_resnet",),
    "vit": (
        "backbones/vit",
        "backbones/deit_distilled",
        "backbones/deit3",
        "backbones/vit_clip_image_tower",
    ),
    "clip": ("backbones/clip_full",),
    "beit": ("backbones/beitv2", "vanillakd/beit"),
    "convnext": ("backbones/convnext", "backbones/convnextv2", "vanillakd/convnextv2"),
    "mixer": ("backbones/mixer", "backbones/resmlp"),
    "swin": ("backbones/swin", "backbones/swin__padded"),
    "swin_v2": ("backbones/swinv2",),
    "mobilenet": ("backbones/mobilenetv2",),
    "mobilenet_v3": ("backbones/mobilenetv3",),
    "efficientnet": ("backbones/efficientnet", "backbones/efficientnet_tf"),
    "ghostnet": ("backbones/ghostnetv1", "backbones/ghostnetv2"),
    "bimlp": ("bimlp/net_M_style", "bimlp/net_S_style", "bimlp/net_S_style_true_sign"),
    "vanillanet": (
        "vanillanet/train_form_eval__small",
        "vanillanet/train_form_eval__adapool",
        "vanillanet/train_mode__small",
        "vanillanet/switch_to_deploy__small",
        "vanillanet/switch_to_deploy__adapool",
    ),
    "parameternet": ("parameternet/net_small",),
}


def paper(name: str) -> str:
    """The paper of variant `name`, an arXiv number; '' for one that no pattern knows."""
    return next((number for pattern, number in PAPERS.items() if fnmatch.fnmatchcase(name, pattern)), "")


def state(family: str) -> str:
    """`outputs` where golden arrays hold the family's outputs to those of the official code, else `counts`."""
    return "outputs" if family in GOLDEN else "counts"
