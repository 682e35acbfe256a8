"""VanillaKD in small on real photographs: a ResNet-20 teacher and four ResNet-8 students on a CIFAR-10 subset.

Command:    python -m launch.sweep --config configs/distill/vanilla_kd_small.py --sweep.seed=0,1,2 \\
              --workdir runs/small --config.data.path=cifar10.zip --config.teacher.workdir=runs/small/teacher
            (one seed: python -m launch.train …; ":teacher" is the teacher's own recipe, trained first; ":smoke")
            Images are halved to 16x16, a CPU's size; a GPU takes --config.augment.size=32 --config.eval.size=32
Hardware:   2 CPU cores; times in README.md
Data:       {train,test}/<class>/<n>.jpg of 32x32 pixels, 10 classes, in a zip or a folder
Published:  nothing of this size; README.md shows our table
"""

from configs import common
from configs.distill.cifar_compare import SMALL
from research.core.config import parse_arg


def get_config(arg: str = ""):
    options = parse_arg(arg, teacher=False, smoke=False)
    small = SMALL if options.smoke else {}
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = 128
    c.epochs = 20.0 if options.teacher else 12.0
    c.data.kind = "zip"
    c.data.path = ""
    c.augment.size = c.eval.size = 16
    c.augment.crop = "pad"
    c.augment.pad = 2
    c.eval.crop = 1.0
    c.eval.every = 3.0
    c.save.every = 3.0
    c.log.every = 26
    c.optimizer.name = "nesterov"
    c.optimizer.lr = 0.1
    c.optimizer.weight_decay = 5e-4
    c.optimizer.clip = 5.0
    c.schedule.warmup_epochs = 1.0
    c.schedule.warmup_lr = 0.01
    c.schedule.min_lr = 0.0
    c.schedule.per_step = True
    if options.teacher:
        c.students = common.arms(teacher=common.student("resnet20", label_loss="ce", options=small))
        c.teacher = common.teacher()
    else:
        student = dict(model="resnet8", label_loss="ce", options=small)
        c.students = common.arms(
            none=common.student(**student),
            kd=common.student(**student, loss="kd", loss_options=dict(temperature=4.0)),
            dkd=common.student(**student, loss="dkd", loss_options=dict(temperature=4.0)),
            dist=common.student(**student, loss="dist", loss_options=dict(temperature=4.0)),
        )
        c.teacher = common.teacher("resnet20", recipe="configs/distill/vanilla_kd_small.py:teacher", options=small)
    return common.smoke(c, size=16) if options.smoke else c
