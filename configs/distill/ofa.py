"""What the OFA-KD configs share: four recipes and a stronger one, the paper's pairs, and the arms to compare.

Recipes are the authors' yaml files (Hao840/OFAKD), for 8 GPUs whose rates are not scaled: `mix.group`, `bn_group` and
`group` keep what one of them saw on any number of devices. Their optimisers hold student and branches together, so
that position embeddings, class tokens and ResMLP's affine vectors are decayed and the norm of all gradients is clipped.
Each network is fed with its own normalisation; the published ImageNet runs fed the teacher with the student's.

Known of eps and weights: 1.5 for DeiT-T to ResNet-18 (README), 1.0 on CIFAR-100 (README), and what `PAIRS` says from
the authors' answers; for the other ImageNet pairs nothing but the paper's 1.1 to 1.4 as the best, so they start at 1.5.
"""

from ml_collections import ConfigDict

from configs import common
from configs.distill import imagenet
from research.core.config import parse_arg

MODELS = {
    "convnext_t": "convnext_tiny",
    "deit_t": "deit_tiny_patch16_224",
    "mixer_b": "mixer_b16_224",
    "mobilenetv2": "mobilenetv2_100",
    "resmlp_s12": "resmlp_12_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_n": "swin_nano_patch4_window7_224",
    "swin_p": "swin_pico_patch4_window7_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "vit_b": "vit_base_patch16_224",
    "vit_s": "vit_small_patch16_224",
}
_IMAGENET = {"eps": 1.5}
_CIFAR = {"eps": 1.0}
_CIFAR_EMA = {"eps": 1.0, "min_lr": 1e-6, "ema": (0.99996,)}
# Recipe -> teacher-student -> eps, weight of the branches and changes of the recipe.
PAIRS = {
    "imagenet_cnn": {
        f"{teacher}-{student}": _IMAGENET
        for student in ("resnet18", "mobilenetv2")
        for teacher in ("deit_t", "swin_t", "mixer_b")
    },
    "imagenet_tokens": {
        **{f"{t}-{s}": _IMAGENET for s in ("deit_t", "swin_n") for t in ("resnet50", "convnext_t", "mixer_b")},
        **{f"{t}-resmlp_s12": _IMAGENET for t in ("resnet50", "convnext_t", "swin_t")},
    },
    "imagenet_stronger": {f"{teacher}-resnet50": _IMAGENET for teacher in ("vit_b", "swin_b", "deit_t")},
    "cifar_cnn": {
        **{f"{t}-resnet18": _CIFAR for t in ("vit_s", "mixer_b")},
        "swin_t-resnet18": {"eps": 1.0, "lr": 0.1, "weight": 0.1},
        **{f"{t}-mobilenetv2": {"eps": 1.0, "weight": 0.1} for t in ("swin_t", "vit_s", "mixer_b")},
    },
    "cifar_tokens": {
        **{f"{t}-{s}": _CIFAR_EMA for s in ("deit_t", "swin_p") for t in ("convnext_t", "mixer_b")},
        **{f"{t}-resmlp_s12": _CIFAR for t in ("convnext_t", "swin_t")},
    },
}
CIFAR_STATS = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
AFFINE = r"/(alpha|beta)$"  # stored as (1, 1, C) officially, which timm's rule decays
_TOKENS = dict(img_size=32, patch_size=8, embed_dim=12)
_SWIN = dict(img_size=32, embed_dim=8)
# Students have four stages, or the six blocks that four taps need; of teachers the last features alone count.
SMALL = {
    "resnet": dict(layers=(1, 1, 1, 1), channels=(4, 4, 8, 8)),
    "mobilenet": dict(stages=(("ds_r1_k3_s1_c8",), *[("ir_r1_k3_s2_e2_c8",)] * 4), stem=8, head=16),
    "swin": {**_SWIN, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "deit": {**_TOKENS, "depth": 6, "num_heads": 3},
    "resmlp": {**_TOKENS, "num_blocks": 6},
}
SMALL_TEACHERS = {
    **imagenet.SMALL,
    "swin": {**_SWIN, "depths": (1, 1), "num_heads": (1, 2)},
    **dict.fromkeys(("vit", "deit"), {**_TOKENS, "depth": 1, "num_heads": 3}),
    "mixer": {**_TOKENS, "num_blocks": 1},
}
# Stages whose branches a smoke run trains: all where a family of students comes first, two where it comes again.
SMOKE_STAGES = {"imagenet_cnn": (1, 2, 3, 4), "imagenet_tokens": (1, 2, 3, 4)}


def recipe(name: str) -> tuple[ConfigDict, int]:
    """(one of the authors' recipes without models, examples a GPU)."""
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    data, kind = name.split("_")
    share = {"imagenet_cnn": 64, "imagenet_stronger": 256}.get(name, 128)
    c.batch_size = 8 * share
    c.epochs = 100.0 if name == "imagenet_cnn" else 300.0
    c.data.kind = "folder"
    c.data.path, c.eval.split = {"imagenet": ("imagenet", "val"), "cifar": ("cifar100", "test")}[data]
    c.data.num_classes = {"imagenet": 1000, "cifar": 100}[data]
    c.data.workers = 16
    c.data.on_corrupt = "skip"
    c.mix.group = share
    c.save.every = 5.0
    c.schedule.warmup_epochs = {"cnn": 3.0, "tokens": 20.0, "stronger": 5.0}[kind]
    c.schedule.warmup_lr = {"cnn": 1e-4, "tokens": 5e-7, "stronger": 1e-6}[kind]
    c.optimizer.name = {"cnn": "nesterov", "tokens": "adamw", "stronger": "lamb"}[kind]
    c.optimizer.options = ConfigDict({"decay_anyway": (AFFINE,)})
    if kind == "cnn":
        c.optimizer.lr, c.optimizer.weight_decay = {"imagenet": (0.1, 1e-4), "cifar": (0.05, 2e-3)}[data]
        c.schedule.min_lr = {"imagenet": 1e-6, "cifar": 1e-3}[data]
        if data == "imagenet":
            c.schedule.name, c.schedule.decay_epochs = "step", 30.0
    else:
        strong = kind == "stronger"
        c.optimizer.lr, c.optimizer.weight_decay = (5e-3, 0.02) if strong else (5e-4, 0.05)
        c.schedule.min_lr = {"imagenet": 1e-6, "cifar": 1e-5}[data]
        c.augment.auto = "rand-m7-mstd0.5" if strong else "rand-m9-mstd0.5-inc1"
        c.mix.mixup, c.mix.cutmix = (0.1, 1.0) if strong else (0.8, 1.0)
        if strong:
            c.data.repeats, c.eval.crop = 3, 0.95
        else:
            c.augment.erase, c.optimizer.clip = 0.25, 5.0
        if data == "imagenet":
            c.ema = (0.9998,) if strong else (0.99996,)
    return c, share


def config(arg: str, recipe_name: str, pair: str) -> ConfigDict:
    """The config of a recipe.

    Args:
      arg: `pair=` one of the recipe's; `arms=` names of configs.distill.imagenet.ARMS and `ofa`, joined by `+`; `eps=`
        of all losses, 0 takes the pair's; `smoke`.
      recipe_name: of PAIRS.
      pair: the default.
    """
    chosen = parse_arg(arg, pair=pair, arms="ofa", eps=0.0, smoke=False)
    known = PAIRS[recipe_name]
    if chosen.pair not in known:
        raise ValueError(f"config argument pair: no pair {chosen.pair!r}; there are {', '.join(known)}")
    given = known[chosen.pair]
    teacher, student = (MODELS.get(name, name) for name in chosen.pair.split("-"))
    c, share = recipe(recipe_name)
    c.optimizer.lr = given.get("lr", c.optimizer.lr)
    c.schedule.min_lr = given.get("min_lr", c.schedule.min_lr)
    c.ema = given.get("ema", c.ema)
    if student.startswith(("deit", "swin")):
        c.eval.crop = 0.9

    strong, convolutional = recipe_name == "imagenet_stronger", student.startswith(("resnet", "mobilenet"))
    own, taught = (small(student, SMALL), small(teacher, SMALL_TEACHERS)) if chosen.smoke else ({}, {})
    stats = CIFAR_STATS if recipe_name.startswith("cifar") else {}
    options = {"bn_group": share} if convolutional else {}
    shared = dict(
        label_loss="bce" if strong else "ce",
        smoothing=0.0 if strong else 0.1,
        dtype="float32" if chosen.smoke else "bfloat16",
        options={**options, **stats, **({"drop_path": 0.05} if strong else {}), **own},
        group=share,
    )
    eps = chosen.eps or given["eps"]
    stages = dict(stages=SMOKE_STAGES.get(recipe_name, (2, 4))) if chosen.smoke else {}
    weights = dict(
        loss_options=dict(eps=eps), hint_options=dict(eps=eps, **stages), hint_weight=given.get("weight", 1.0)
    )
    table = imagenet.ARMS | {"ofa": dict(loss="ofa", hint="ofa", **weights)}
    names = chosen.arms.split("+")
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(table)}")
    arms = {name: {**table[name], "label_loss": shared["label_loss"]} for name in names}
    c.students = common.arms(**{name: common.student(student, **{**shared, **arm}) for name, arm in arms.items()})
    c.teacher = common.teacher(model=teacher, dtype="bfloat16", options={**stats, **taught})
    c.save.best = f"{names[0]}/top1"  # the published accuracies are those of the best epoch
    return imagenet.smoke(c) if chosen.smoke else c


def small(model: str, table: dict[str, dict]) -> dict:
    """Constructor options that make a model small enough for a test."""
    return next(options for family, options in table.items() if model.startswith(family))
