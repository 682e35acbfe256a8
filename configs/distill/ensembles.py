"""Students of several teachers and of whole functions: MEAL V2 and FunMatch, a ResNet-50 each.

Command:    python -m launch.train --config configs/distill/ensembles.py:method=meal_v2 \\
              --config.data.path=/data/imagenet --config.teacher.weights=resnet152.safetensors \\
              --config.teacher.ensemble.second.weights=resnet101.safetensors \\
              --config.students.meal_v2.weights=resnet50.safetensors
            (":method=funmatch": teacher.weights alone, of BiT-R152x2, no student weights; ":smoke")
Hardware:   8 H100: MEAL V2 about 2 days, FunMatch about 12 days (estimated at 35 % MFU; not run here)
Data:       ImageNet, {train,val}/<class>/<n>.JPEG
Published:  MEAL V2 80.67 (100 epochs and 100 more at a tenth of the rate; teachers SENet-154 and ResNet-152-v1s, where
            this config has ResNet-152 and ResNet-101); FunMatch 82.8 at 9600 epochs, 82.3 at 1200 (224 pixels)
"""

from configs import common
from configs.distill import imagenet
from research.core.config import parse_arg

METHODS = ("meal_v2", "funmatch")
BIT_SMALL = dict(layers=(1, 1), channels=(8, 16), stem_chs=4, width_factor=1, groupnorm_groups=2)


def get_config(arg: str = ""):
    options = parse_arg(arg, method="meal_v2", smoke=False)
    if options.method not in METHODS:
        raise ValueError(f"config argument method: no {options.method!r}; there are {', '.join(METHODS)}")
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.data.kind, c.data.path, c.data.num_classes, c.eval.split = "folder", "imagenet", 1000, "val"
    c.data.workers, c.data.on_corrupt = 16, "skip"
    c.save.every = 5.0
    reduced = BIT_SMALL if options.method == "funmatch" else imagenet.CONV_SMALL
    small = reduced if options.smoke else {}
    shared = dict(dtype="float32" if options.smoke else "bfloat16", label_loss="ce", label_weight=0.0)
    teacher = lambda name: common.teacher(name, dtype="bfloat16", options=small)
    if options.method == "meal_v2":
        # The student starts from ImageNet weights; no labels, no decay, a discriminator beside the soft labels.
        c.batch_size, c.epochs = 512, 100.0
        c.augment.jitter = 0.4
        c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay = "sgd", 0.01, 0.0
        c.schedule.name, c.schedule.warmup_epochs, c.schedule.min_lr = "constant", 0.0, 0.0
        reduction = 2 if options.smoke else 8
        arm = dict(loss="meal", hint="discriminator", hint_options=dict(reduction=reduction))
        c.students = common.arms(meal_v2=common.student("resnet50", **shared, **arm, options=small))
        c.teacher = teacher("resnet152")
        c.teacher.ensemble = common.arms(second=teacher("resnet101"))
    else:
        # Mixup with lam of U(0, 1) on every batch: the function is matched between images too.
        c.batch_size, c.epochs = 4096, 1200.0
        c.mix.mixup = 1.0
        c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay, c.optimizer.clip = "adamw", 0.03, 3e-4, 1.0
        c.schedule.warmup_epochs, c.schedule.min_lr, c.schedule.per_step = 4.0, 0.0, True
        c.students = common.arms(funmatch=common.student("resnetv2_50x1_bit", **shared, loss="funmatch", options=small))
        c.teacher = teacher("resnetv2_152x2_bit")
    if options.smoke:
        c = imagenet.smoke(c)
        for more in c.teacher.ensemble.values():
            more.weights, more.dtype = "random", "float32"
    return c
