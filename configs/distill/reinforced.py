"""Distillation from stored labels on ImageNet, ResNet-50 student: Dataset Reinforcement, FKD, MEAL V2 and ReLabel.

Command:    python -m launch.labels --config configs/distill/reinforced.py --output labels --views 50 --top 10 \\
              --config.data.path=/data/imagenet --config.teacher.weights=beitv2_large_patch16_224.safetensors
            python -m launch.train --config configs/distill/reinforced.py --config.teacher.labels=labels \\
              --config.data.path=/data/imagenet
            (both with the same argument: ":form=fkd" --top 5, ":form=mealv2" --top 0, ":form=relabel" --form maps of
            ":teacher=resnet152"; of the first also ":views=cropflip", "mixing" or "both" instead of "augmented";
            ":smoke"; without teacher.labels the teacher runs beside, as in any other config)
Hardware:   8 H200: labels 50 x 1.28 M views of BEiTv2-L about 2.5 h, training 40 min, bound by decoding (estimated)
Published:  Dataset Reinforcement, top-1 79.0 -> 80.3 (150 epochs), 79.6 -> 81.2 (300), 80.0 -> 82.0 (1000), from an
            ensemble of four IG-ResNeXt-101, 400 views; MEAL V2 80.67, from two teachers and a pretrained student;
            ReLabel 77.5 -> 78.9, 80.2 with cutmix, from EfficientNet-L2; FKD: no number read
"""

from configs import common
from configs.distill import imagenet
from research.core.config import parse_arg

AUGMENTED = dict(auto="rand-m9-n2", erase=0.25, erase_mode="const")
VIEWS = {
    # ml-dr draws mixup and cutmix independently, each with probability 0.5; here a quarter of the images stay unmixed
    # as there, and no image is mixed twice. Its RandAugment is torchvision's, this one timm's.
    "cropflip": ({}, {}),
    "augmented": (AUGMENTED, {}),
    "mixing": ({}, dict(mixup=1.0, cutmix=1.0, prob=0.75)),
    "both": (AUGMENTED, dict(mixup=1.0, cutmix=1.0, prob=0.75)),
}
SOFT = dict(label_loss="ce", label_weight=0.0)  # the stored labels alone
FORMS = {
    # ml-dr trains on the original label in 1 % of the examples (p = 0.99); here on the stored one in all.
    "reinforced": dict(arm=dict(SOFT, loss="kd"), epochs=150.0, lr=0.4, batch=1024, decay=1e-4, warmup=5.0),
    # Soft cross-entropy of marginal_smoothing_k5; four crops of an image in a batch, as repeated augmentation.
    "fkd": dict(arm=dict(SOFT, loss="meal"), epochs=300.0, lr=0.1, batch=1024, decay=1e-4, warmup=0.0),
    # From a pretrained student, students.mealv2.weights.
    "mealv2": dict(
        arm=dict(SOFT, loss="meal", hint="discriminator"), epochs=100.0, lr=0.01, batch=512, decay=0.0, warmup=0.0
    ),
    # The published run with cutmix: AdamP, 300 epochs; this is its batch and length with plain SGD.
    "relabel": dict(arm=dict(SOFT, loss="meal"), epochs=300.0, lr=0.4, batch=1024, decay=1e-4, warmup=5.0),
}


def get_config(arg: str = ""):
    chosen = parse_arg(arg, form="reinforced", views="augmented", teacher="beitv2_large", smoke=False)
    c, form = common.base(), FORMS[chosen.form]
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size, c.epochs = form["batch"], form["epochs"]
    c.data.kind, c.data.path, c.data.num_classes = "folder", "imagenet", 1000
    c.data.workers, c.data.on_corrupt = 16, "skip"
    augment, mix = VIEWS[chosen.views if chosen.form == "reinforced" else "cropflip"]
    c.augment.update(augment)
    c.mix.update(mix)
    if chosen.form == "fkd":
        c.data.repeats = 4
    if chosen.form == "relabel":
        c.augment.jitter, c.mix.cutmix = 0.4, 1.0
    c.eval.split = "val"
    c.optimizer.name = "sgd"
    c.optimizer.lr, c.optimizer.weight_decay = form["lr"], form["decay"]
    c.schedule.warmup_epochs = form["warmup"]
    c.schedule.min_lr, c.schedule.per_step = 0.0, True
    c.save.every = 5.0
    model = imagenet.TEACHERS.get(chosen.teacher, chosen.teacher)
    share = c.batch_size // 8  # images a GPU of the published runs
    arm = common.student("resnet50", dtype="bfloat16", options={"bn_group": share}, **form["arm"])
    c.students = common.arms(**{chosen.form: arm})
    c.teacher = common.teacher(model, dtype="bfloat16")
    return _smoke(c, arm) if chosen.smoke else c


def _smoke(c, arm):
    arm.dtype, arm.options = "float32", imagenet.CONV_SMALL
    c.teacher.options = imagenet.CONV_SMALL if c.teacher.model.startswith("resnet") else imagenet.TOKENS_SMALL
    if arm.hint:
        arm.hint_options = {"reduction": 2}  # ten classes divide by it twice
    c = imagenet.smoke(c)
    c.mix.group = 0
    return c
