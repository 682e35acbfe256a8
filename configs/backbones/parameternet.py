"""ParameterNet on ImageNet-1K: the network whose convolutions have four experts, and its static twin, in one run.

Command:    python -m launch.train --config configs/backbones/parameternet.py --config.data.path=/data/imagenet
            (":variant=parameternet_300m" or any in research.backbones; ":arms=dynamic" without the twin; ":smoke")
Hardware:   8 H200 about 20 h, bound by decoding (estimated; not run here)
Published:  top-1 from scratch: parameternet_300m 77.2, _600m 79.0; the twins of plain convolutions 76.3 and 78.6. After
            pre-training on ImageNet-22K 79.1, 81.6 and 75.7, 78.3. The authors published no recipe: these are the
            usual values of such runs, read in a summary of the paper
"""

from configs import common
from research.core.config import parse_arg
from research.core.errors import UserError

ARMS = {"dynamic": {}, "static": {"num_experts": 0}}
SMALL = {"cfgs": (((3, 16, 16, 0, 1),), ((3, 48, 24, 0.25, 2),)), "width": 0.5, "head": 16}


def get_config(arg: str = ""):
    chosen = parse_arg(arg, variant="parameternet_600m", arms="dynamic+static", smoke=False)
    names = chosen.arms.split("+")
    if unknown := [name for name in names if name not in ARMS]:
        raise UserError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = 1024
    c.epochs = 300.0
    c.data.kind = "folder"
    c.data.path = "imagenet"
    c.data.num_classes = 1000
    c.data.workers = 16
    c.data.on_corrupt = "skip"
    c.augment.auto = "rand-m9-mstd0.5-inc1"
    c.augment.erase = 0.25
    c.eval.split = "val"
    c.optimizer.lr = 1e-3
    c.optimizer.weight_decay = 0.05
    c.schedule.warmup_epochs = 20.0
    c.save.every = 5.0
    shared = dict(dtype="float32" if chosen.smoke else "bfloat16", label_loss="ce", smoothing=0.1)
    small = SMALL if chosen.smoke else {}
    c.students = common.arms(
        **{name: common.student(chosen.variant, options={**ARMS[name], **small}, **shared) for name in names}
    )
    c.teacher = common.teacher()
    if chosen.smoke:
        c = common.smoke(c)
        c.data.num_classes, c.data.workers = 10, 0
    return c
