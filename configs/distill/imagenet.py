"""What the VanillaKD configs for ImageNet share: recipes A1 and A2, their teachers, and the arms that can be compared.

Recipes: "ResNet strikes back" (arXiv 2110.00476) as VanillaKD's README commands set them: 8 GPUs x 256 images, LAMB,
BCE, repeated augmentation, RandAugment, mixup and cutmix. `mix.group`, `bn_group` and `group` keep what one GPU saw,
256 images, on any number of devices.
"""

from ml_collections import ConfigDict

from configs import common
from research.core.config import parse_arg

SHARE = 256  # images a GPU of the published runs
TEACHERS = {
    "beitv2_base": "beitv2_base_patch16_224",
    "beitv2_large": "beitv2_large_patch16_224",
    "resnet152": "resnet152",
}
# Label weight and distillation weight are 1 everywhere; the hint baselines were run with cross-entropy.
ARMS = {
    "none": {},
    "kd": dict(loss="kd", loss_options=dict(temperature=1.0)),
    "bkd": dict(loss="bkd"),
    "dkd": dict(loss="dkd", loss_options=dict(alpha=1.0, beta=2.0, temperature=1.0)),
    "dist": dict(loss="dist", loss_options=dict(beta=1.0, gamma=1.0, temperature=1.0)),
    "cc": dict(hint="cc", label_loss="ce"),
    "rkd": dict(hint="rkd", label_loss="ce"),
    "crd": dict(hint="crd", label_loss="ce"),
    "review": dict(hint="review", label_loss="ce"),
}
# Two stages and two blocks: strides and rates of dropped paths that differ. A teacher's blocks are all alike.
CONV_SMALL = dict(layers=(1, 1), channels=(4, 8))
TOKENS_SMALL = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)
SMALL = {
    "resnet": CONV_SMALL,
    "convnext": dict(depths=(1, 1), dims=(8, 16)),
    **dict.fromkeys(("vit", "deit"), TOKENS_SMALL),
    "beitv2": {**TOKENS_SMALL, "depth": 1},
}


def recipe(name: str) -> ConfigDict:
    """Recipe "a1" (600 epochs) or "a2" (300 epochs) without models."""
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = 2048
    c.epochs = {"a1": 600.0, "a2": 300.0}[name]
    c.data.kind = "folder"
    c.data.path = "imagenet"
    c.data.num_classes = 1000
    c.data.workers = 16
    c.data.repeats = 3
    c.data.on_corrupt = "skip"
    c.augment.auto = "rand-m7-mstd0.5"
    c.eval.split = "val"
    c.eval.crop = 0.95
    c.mix.mixup = {"a1": 0.2, "a2": 0.1}[name]
    c.mix.cutmix = 1.0
    c.mix.group = SHARE
    c.optimizer.name = "lamb"
    c.optimizer.lr = 5e-3
    c.optimizer.weight_decay = {"a1": 0.01, "a2": 0.02}[name]
    # The official ConvNeXt V2 stores GRN's vectors with four axes, which timm's rule decays.
    exceptions = {"no_decay": ("pos_embed", "cls_token"), "decay_anyway": (r"grn/(scale|bias)$",)}
    c.optimizer.options = ConfigDict(exceptions)
    c.save.every = 5.0
    return c


def config(arg: str, student: str, recipe_name: str, **options) -> ConfigDict:
    """The config of one published experiment.

    Args:
      arg: `teacher=` beitv2_base, beitv2_large or resnet152; `arms=` names of ARMS joined by `+`, all trained with the
        same teacher forwards; `smoke`.
      student: model of every arm.
      recipe_name: "a1" or "a2".
      **options: of the student's constructor.
    """
    chosen = parse_arg(arg, teacher="beitv2_base", arms="kd", smoke=False)
    c = recipe(recipe_name)
    model = TEACHERS.get(chosen.teacher, chosen.teacher)
    small = {name: smoke_options(name) if chosen.smoke else {} for name in (student, model)}
    shared = dict(
        dtype="float32" if chosen.smoke else "bfloat16",
        smoothing=0.1 if recipe_name == "a1" else 0.0,
        options={"drop_path": 0.05, "remat": False, **options, **small[student]},
        group=SHARE,
    )
    names = chosen.arms.split("+")
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    c.students = common.arms(**{name: common.student(student, **{**shared, **ARMS[name]}) for name in names})
    c.teacher = common.teacher(model, dtype="bfloat16", options=small[model])
    return smoke(c) if chosen.smoke else c


def smoke_options(model: str) -> dict:
    """Constructor options that make a model small enough for a test."""
    return next(options for family, options in SMALL.items() if model.startswith(family))


def smoke(c: ConfigDict) -> ConfigDict:
    c = common.smoke(c)
    c.data.num_classes, c.data.workers = 10, 0
    c.teacher.weights = "random"
    c.mix.group = 8
    for student in c.students.values():
        student.group = 8
        if "bn_group" in student.options:
            student.options.bn_group = 8
        if student.hint == "crd":
            student.hint_options = ConfigDict({"negatives": 16})
    return c
