"""The light backbones in small on real photographs: what their one idea does where everything else is equal.

Command:    python -m launch.sweep --config configs/backbones/small.py:family=vanillanet --sweep.seed=0,1,2 \\
              --workdir runs/vanillanet_small --config.data.path=cifar10.zip --report
            (":family=" one of FAMILIES, ":arms=" some of its arms joined by "+"; one seed: python -m launch.train …;
            ":smoke")
Hardware:   2 CPU cores; times in research/backbones/README.md
Data:       {train,test}/<class>/<n>.jpg of 32x32 pixels, 10 classes, in a zip or a folder
Published:  nothing of this size; research/backbones/README.md shows our tables

Arms share data, order and augmentation. Those of `vanillanet` differ in their activation, series or ReLU alone; each
trains twice the convolutions with the slope annealed over half of the epochs (--sweep.slope.decay_epochs=5.0,0.0
compares with linear ones from the start), and its merged form is scored as `<arm>_deploy`. The arms of `parameternet`
have so many experts a convolution, `plain` none. Those of `bimlp` differ in their quantisers: `real` has neither,
`ternary` is the official network, `sign` the paper's, and `activations` has ternary activations and real weights, the
first step of two-step training.
"""

from typing import NamedTuple

from configs import common
from research.core.config import parse_arg
from research.core.errors import UserError


class Family(NamedTuple):
    """A small network, its arms' options, the arms trained by default, and the side of the images in pixels."""

    model: str
    options: dict
    smoke: dict
    arms: dict[str, dict]
    chosen: str
    size: int
    experiment: str = "research.distill.vanilla_kd"


GHOST = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((3, 72, 40, 0.25, 2), (3, 120, 40, 0.25, 1)),
)
FAMILIES = {
    "vanillanet": Family(
        "vanillanet_6",
        {"dims": (32, 64, 128, 256, 256), "strides": (1, 2, 2, 1)},
        {"dims": (4, 4, 8, 8, 8)},
        {"series": {"act_num": 1}, "relu": {"act_num": 0}},
        "series+relu",
        32,
        "research.distill.deep_training",
    ),
    "parameternet": Family(
        "parameternet_600m",
        {"cfgs": GHOST, "width": 1.0, "head": 256},
        {"cfgs": (GHOST[0],), "head": 16},
        {"plain": {"num_experts": 0}, **{f"experts{count}": {"num_experts": count} for count in (1, 2, 4)}},
        "experts1+experts2+experts4",
        16,
    ),
    "bimlp": Family(
        "bimlp_s",
        {"layers": (1, 1), "embed_dims": (32, 64)},
        {"layers": (1,), "embed_dims": (4,)},
        {
            "real": {"activation": "real", "weights": "real"},
            "activations": {"activation": "ternary", "weights": "real"},
            "ternary": {"activation": "ternary", "weights": "xnor"},
            "sign": {"activation": "sign", "weights": "xnor"},
        },
        "real+ternary+sign",
        16,
    ),
}


def get_config(arg: str = ""):
    options = parse_arg(arg, family="vanillanet", arms="", smoke=False)
    if options.family not in FAMILIES:
        raise UserError(f"config argument family: no family {options.family!r}; there are {', '.join(FAMILIES)}")
    family = FAMILIES[options.family]
    names = (options.arms or family.chosen).split("+")
    if unknown := [name for name in names if name not in family.arms]:
        raise UserError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(family.arms)}")
    c = common.base()
    c.experiment = family.experiment
    c.batch_size = 64
    c.epochs = 10.0
    c.data.kind = "zip"
    c.augment.size = c.eval.size = family.size
    c.augment.crop, c.augment.pad = "pad", family.size // 8
    c.eval.crop = 1.0
    c.eval.every = c.save.every = 5.0
    c.log.every = 52
    c.optimizer.lr = 2e-3
    c.optimizer.clip = 5.0
    c.schedule.warmup_epochs = 1.0
    c.schedule.warmup_lr = 1e-4
    c.schedule.min_lr = 0.0
    c.schedule.per_step = True
    if family.experiment.endswith("deep_training"):
        c.slope = dict(decay_epochs=c.epochs / 2, curve="linear")
    shape = {**family.options, **(family.smoke if options.smoke else {})}
    arm = lambda name: common.student(family.model, label_loss="ce", options={**shape, **family.arms[name]})
    c.students = common.arms(**{name: arm(name) for name in names})
    c.teacher = common.teacher()
    return common.smoke(c) if options.smoke else c
