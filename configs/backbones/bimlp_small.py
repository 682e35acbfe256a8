"""What binarising costs, in small on real photographs: one BiMLP with real, ternary and sign activations.

Command:    python -m launch.sweep --config configs/backbones/bimlp_small.py --sweep.seed=0,1,2 \\
              --workdir runs/bimlp_small --config.data.path=cifar10.zip
            (one seed: python -m launch.train …; ":arms=" any of QUANTISERS joined by "+"; ":smoke")
Hardware:   2 CPU cores, about an hour for three seeds (estimated from single steps; not run here)
Data:       {train,test}/<class>/<n>.jpg of 32x32 pixels, 10 classes, in a zip or a folder
Published:  nothing of this size; research/backbones/README.md shows our table

The arms differ in their quantisers alone: `real` has neither, `ternary` is the official network, `sign` the paper's,
and `activations` has ternary activations and real weights, the first step of two-step training.
"""

from configs import common
from research.core.config import parse_arg
from research.core.errors import UserError

QUANTISERS = {
    "real": ("real", "real"),
    "activations": ("ternary", "real"),
    "ternary": ("ternary", "xnor"),
    "sign": ("sign", "xnor"),
}
SHAPE = {"layers": (1, 1), "embed_dims": (32, 64)}
SMALL = {"layers": (1,), "embed_dims": (4,)}


def get_config(arg: str = ""):
    options = parse_arg(arg, arms="real+ternary+sign", smoke=False)
    names = options.arms.split("+")
    if unknown := [name for name in names if name not in QUANTISERS]:
        raise UserError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(QUANTISERS)}")
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = 128
    c.epochs = 10.0
    c.data.kind = "zip"
    c.augment.size = c.eval.size = 32
    c.augment.crop = "pad"
    c.eval.crop = 1.0
    c.eval.every = 5.0
    c.save.every = 5.0
    c.log.every = 26
    c.optimizer.lr = 2e-3
    c.optimizer.clip = 5.0
    c.schedule.warmup_epochs = 1.0
    c.schedule.warmup_lr = 1e-4
    c.schedule.min_lr = 0.0
    c.schedule.per_step = True
    arm = lambda activation, weights: common.student(
        "bimlp_s",
        label_loss="ce",
        options=dict(activation=activation, weights=weights, **(SMALL if options.smoke else SHAPE)),
    )
    c.students = common.arms(**{name: arm(*QUANTISERS[name]) for name in names})
    c.teacher = common.teacher()
    return common.smoke(c) if options.smoke else c
