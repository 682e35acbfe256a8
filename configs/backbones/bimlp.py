"""BiMLP on ImageNet, distilled from a real-valued network, in two steps: binary activations first, then weights too.

Command:    python -m launch.train --config configs/backbones/bimlp.py:step=1 \\
              --workdir runs/bimlp_s_1 --config.data.path=/data/imagenet --config.teacher.weights=resnet101.safetensors
            python -m launch.train --config configs/backbones/bimlp.py:step=2 --workdir runs/bimlp_s_2 \\
              --config.data.path=/data/imagenet --config.teacher.weights=resnet101.safetensors \\
              --config.students.kd.weights=runs/bimlp_s_1/weights/kd.safetensors
            (":variant=bimlp_m", ":activation=sign" or "bireal", ":teacher=" any backbone, ":smoke")
Hardware:   8 GPUs of 40 GB or more; not run here, so no time is known
Published:  top-1 71.56 for bimlp_m (README of the official code). The authors gave no recipe: data, length and
            optimiser are Wave-MLP's, the real-valued network they started from; the two steps, a loss of the teacher's
            distribution alone, the teacher and no weight decay in step 2 are ReActNet's (arXiv 2003.03488)
"""

from configs import common
from research.core.config import parse_arg
from research.core.errors import UserError

SHARE = 128  # images a GPU of Wave-MLP's runs, 8 of them
STEPS = {1: {"weights": "real"}, 2: {"weights": "xnor"}}
SMALL = {"layers": (1,), "embed_dims": (4,), "bn_group": 8}
SMALL_TEACHER = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}


def get_config(arg: str = ""):
    chosen = parse_arg(arg, variant="bimlp_s", step=2, activation="ternary", teacher="resnet101", smoke=False)
    if chosen.step not in STEPS:
        raise UserError(f"config argument step: {chosen.step} is neither 1 (real weights) nor 2 (binary weights)")
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = 1024
    c.epochs = 300.0
    c.data.kind = "folder"
    c.data.path = "imagenet"
    c.data.num_classes = 1000
    c.data.workers = 16
    c.data.repeats = 3
    c.data.on_corrupt = "skip"
    c.augment.auto = "rand-m9-mstd0.5-inc1"
    c.augment.erase = 0.25
    c.eval.split = "val"
    c.mix.mixup = 0.8
    c.mix.cutmix = 1.0
    c.mix.group = SHARE
    c.optimizer.weight_decay = 0.05 if chosen.step == 1 else 0.0
    c.ema = (0.99996,)
    c.save.every = 5.0
    options = dict(activation=chosen.activation, drop_path=0.1, bn_group=SHARE, **STEPS[chosen.step])
    student = dict(
        dtype="float32" if chosen.smoke else "bfloat16",
        options={**options, **(SMALL if chosen.smoke else {})},
        label_loss="ce",
        label_weight=0.0,
        loss="kd",
    )
    c.students = common.arms(kd=common.student(chosen.variant, **student))
    c.teacher = common.teacher(chosen.teacher, dtype="bfloat16", options=SMALL_TEACHER if chosen.smoke else {})
    return smoke(c) if chosen.smoke else c


def smoke(c):
    c = common.smoke(c)
    c.data.num_classes, c.data.workers = 10, 0
    c.teacher.weights = "random"
    c.mix.group = 8
    return c
