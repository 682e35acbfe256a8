"""VanillaNet on ImageNet, the official recipes: deep training with the slope annealed over 100 of 300 epochs.

Command:    python -m launch.train --config configs/backbones/vanillanet.py:variant=vanillanet_6 \\
              --config.data.path=/data/imagenet
            (":variant=" vanillanet_5 to _13, _13_x1_5, _13_x1_5_ada_pool; ":smoke" runs two steps)
Hardware:   8 H200 about 10 h for vanillanet_6, bound by decoding (estimated; not run here)
Published:  top-1 of vanillanet_5 to _10, evaluated from the moving average: 72.49, 76.36, 77.98, 79.13, 79.87, 80.57;
            _11 to _13 81.08, 81.55, 82.05, _13_x1_5 82.53, with adaptive pooling 83.11. The authors gave no recipe of
            those five: here they train as vanillanet_10
"""

from configs import common
from research.backbones import vanillanet
from research.core.config import parse_arg
from research.core.errors import UserError

SHARE = 128  # images a GPU of the published runs, 8 of them
# Learning rate, weight decay, mixup, and stages under a layer-wise decay of 0.8 (0: none), from the README's commands.
RECIPES = {
    "vanillanet_5": (3.5e-3, 0.35, 0.1, 0),
    "vanillanet_6": (4.8e-3, 0.32, 0.15, 4),
    "vanillanet_7": (4.7e-3, 0.35, 0.4, 5),
    "vanillanet_8": (3.5e-3, 0.3, 0.4, 0),
    "vanillanet_9": (3.5e-3, 0.3, 0.4, 0),
    "vanillanet_10": (3.5e-3, 0.25, 0.4, 0),
}
UNPUBLISHED = ("vanillanet_11", "vanillanet_12", "vanillanet_13", "vanillanet_13_x1_5", "vanillanet_13_x1_5_ada_pool")
RECIPES |= dict.fromkeys(UNPUBLISHED, RECIPES["vanillanet_10"])
# Parameters of the optimiser are those of one arm, `model/stages_0/...`.
LAYERS = ((r"(?:^|/)stem", 0), (r"(?:^|/)stages_(\d+)/", 1))


def get_config(arg: str = ""):
    chosen = parse_arg(arg, variant="vanillanet_6", smoke=False)
    if chosen.variant not in RECIPES:
        raise UserError(f"config argument variant: no recipe of {chosen.variant!r}; there are {', '.join(RECIPES)}")
    lr, weight_decay, mixup, stages = RECIPES[chosen.variant]
    c = common.base()
    c.experiment = "research.distill.deep_training"
    c.slope = dict(decay_epochs=100.0, curve="linear")
    c.batch_size = 1024
    c.epochs = 300.0
    c.data.kind = "folder"
    c.data.path = "imagenet"
    c.data.num_classes = 1000
    c.data.workers = 16
    c.data.on_corrupt = "skip"
    c.augment.auto = "rand-m7-mstd0.5-inc1"
    c.augment.erase = 0.25
    c.eval.split = "val"
    c.eval.every = 20.0
    c.mix.mixup = mixup
    c.mix.cutmix = 1.0
    c.mix.group = SHARE
    c.optimizer.name = "lamb"
    c.optimizer.lr = lr
    c.optimizer.weight_decay = weight_decay
    c.optimizer.options = dict(eps=1e-8)
    if stages:
        c.optimizer.options.lr_scale = dict(decay=0.8, rules=LAYERS, layers=stages + 1)
    c.schedule.warmup_lr = 0.0
    c.schedule.warmup_prefix = True
    c.schedule.warmup_reaches = True
    c.schedule.per_step = True
    c.ema = (0.99996,)
    c.save.every = 5.0
    options = dict(drop_rate=0.05, bn_group=SHARE)
    if chosen.smoke:
        options |= _small(chosen.variant)
    dtype = "float32" if chosen.smoke else "bfloat16"
    c.students = common.arms(
        model=common.student(chosen.variant, dtype=dtype, smoothing=0.1, options=options),
    )
    c.teacher = common.teacher()
    return smoke(c) if chosen.smoke else c


def _small(variant: str) -> dict:
    """The variant with 128 times fewer channels, for tests."""
    return {"dims": tuple(width // 128 for width in vanillanet.VARIANTS[variant]["dims"]), "bn_group": 8}


def smoke(c):
    c = common.smoke(c)
    c.data.num_classes, c.data.workers = 10, 0
    c.mix.group = 8
    return c
