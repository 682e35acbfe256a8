"""The main job in small: a ResNet teacher and three ways to distil it into a tiny mixer, on handwritten digits.

Command:    make quickstart, or python -m launch.train --config configs/distill/digits.py
            (":teacher" is the teacher's own recipe, trained first; ":smoke" runs two steps)
Hardware:   2 CPU cores, about half a minute a seed
Data:       scikit-learn's 1,797 digits of 8x8 pixels, embedded in the library
Published:  nothing; the README shows our table
"""

from configs import common
from configs.distill.cifar_compare import SMALL
from research.core.config import parse_arg


def get_config(arg: str = ""):
    options = parse_arg(arg, teacher=False, smoke=False)
    small = SMALL if options.smoke else {}
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = 64
    c.epochs = 30.0
    c.data.kind = "digits"
    c.augment.size = c.eval.size = 16
    c.augment.crop = "resized"
    c.augment.scale = (0.35, 1.0)  # hard crops: labels alone say little about them, a teacher says more
    c.augment.flip = 0.0
    c.eval.crop = 1.0
    c.eval.every = 4.0
    c.log.every = 22
    c.optimizer.lr = 2e-3
    c.optimizer.clip = 1.0  # DIST's gradient is huge while the student's logits are all equal
    c.schedule.warmup_epochs = 2.0
    c.save.every = 10.0
    if options.teacher:
        c.epochs = 15.0
        c.students = common.arms(teacher=common.student("resnet14", label_loss="ce", options=small))
        c.teacher = common.teacher()
    else:
        student = dict(
            model="mixer_s16_224",
            options=dict(img_size=16, patch_size=4, embed_dim=32, num_blocks=1 if options.smoke else 2),
            label_loss="ce",
        )
        c.students = common.arms(
            none=common.student(**student),
            kd=common.student(**student, loss="kd", loss_options=dict(temperature=4.0)),
            dkd=common.student(**student, loss="dkd", loss_options=dict(temperature=4.0)),
            dist=common.student(**student, loss="dist", loss_options=dict(temperature=1.0)),
        )
        c.teacher = common.teacher("resnet14", recipe="configs/distill/digits.py:teacher", options=small)
    return common.smoke(c, size=16) if options.smoke else c
