"""What the GPT4Image configs share: data, the two arms (labels alone, and with the text loss), the text head's forms.

A plain arm beside the text's is the measure of it: both start from equal weights and see the same batches. The authors'
lambda is 0.3, but each of their GPUs differentiated the global loss for its own rows before the average over GPUs; the
whole gradient that is taken here therefore has the weight 0.3 / GPUs (`--config.students.text.hint_weight=0.3` for the
paper's equation).
"""

from ml_collections import ConfigDict

from configs import common
from configs.distill import imagenet
from research.core.config import parse_arg

LAMBDA = 0.3
RESNET = dict(tau=0.2, norm=True, init_std=1 / 32)
DEIT = dict(tau=0.05, norm=False, init_std=0.02)


def recipe(gpus: int, share: int) -> ConfigDict:
    """ImageNet for `gpus` of `share` images each, without models and optimiser."""
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size = gpus * share
    c.data.kind = "folder"
    c.data.path = "imagenet"
    c.data.num_classes = 1000
    c.data.workers = 16
    c.data.on_corrupt = "skip"
    c.eval.split = "val"
    c.mix.group = share
    c.save.every = 5.0
    c.schedule.min_lr = 1e-5
    c.teacher = common.teacher()
    return c


def strong(c: ConfigDict) -> ConfigDict:
    """The recipe with DeiT's augmentation: RandAugment, erasing, mixup and cutmix."""
    c.augment.auto = "rand-m9-mstd0.5-inc1"
    c.augment.interpolation = "bicubic"
    c.augment.erase = 0.25
    c.mix.mixup, c.mix.cutmix = 0.8, 1.0
    return c


def config(arg: str, c: ConfigDict, model: str, gpus: int, head: dict, smoothing: float, **options) -> ConfigDict:
    """The config of one network.

    Args:
      arg: `arms=` `none`, `text` or both joined by `+`; `loss=` byol, ctr or clip; `smoke`.
      c: its recipe.
      gpus: of the published run, over which the text loss's gradient is averaged.
      head: RESNET or DEIT.
      **options: of the student's constructor.
    """
    chosen = parse_arg(arg, arms="none+text", loss="clip", smoke=False)
    share = c.batch_size // gpus
    small = imagenet.smoke_options(model) if chosen.smoke else {}
    shared = dict(
        label_loss="ce",
        smoothing=smoothing,
        dtype="float32" if chosen.smoke else "bfloat16",
        options={**options, **small},
        group=share,
    )
    hint = dict(hint="gpt4image", hint_options={**head, "loss": chosen.loss}, hint_weight=LAMBDA / gpus)
    table = {"none": {}, "text": hint}
    names = chosen.arms.split("+")
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(table)}")
    c.students = common.arms(**{name: common.student(model, **shared, **table[name]) for name in names})
    if not chosen.smoke:
        return c
    c.teacher.text = "random"
    return imagenet.smoke(c)
