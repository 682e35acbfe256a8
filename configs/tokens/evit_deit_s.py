"""EViT on DeiT-S by the authors' two scripts: fine-tuned from DeiT's checkpoint, or from scratch with fewer and fewer
patches.

Command:    python -m launch.train --config configs/tokens/evit_deit_s.py --config.data.path=/data/imagenet \\
              --config.students.evit.weights=deit_small_patch16_224.safetensors
            python -m launch.train --config configs/tokens/evit_deit_s.py:scratch --config.data.path=/data/imagenet
            (":keep=0.5" another rate; ":fuse=false"; ":scratch,levels=12" falls in smaller steps; ":smoke")
Hardware:   1 H200 about 40 min, from scratch about 7 h (estimated at 30 % MFU, if 17000 images a second arrive; not
            run here)
Published:  from scratch, top-1 79.5 at 3.03 G multiply-adds (0.7, fused; not fused 79.4), 79.8 at 4.03 G (0.9),
            78.5 at 2.31 G (0.5); dense 79.8 at 4.60 G

From scratch the keep rate is 1 for ten epochs and falls along a cosine for a hundred. The authors took another rate in
every step; here it falls in `levels` steps, each of which is compiled once, before training starts. Every evaluation is
at the last rate. Fine-tuning begins with it, and leaves stochastic depth out, as the authors' code does.
"""

from ml_collections import ConfigDict, config_dict

from configs import common
from configs.distill import gpt4image, imagenet
from research.core.config import parse_arg
from research.tokens import evit

MODEL = "deit_small_patch16_224"
BLOCKS = (3, 6, 9)
GPUS, SHARE = 8, 256
START, SHRINK = 10, 100  # epochs
STEPS = 1_281_167 // (GPUS * SHARE)  # an epoch of ImageNet
SMALL = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)


def rates(keep: float, levels: int) -> tuple[tuple[float, float], ...]:
    """(epoch, rate that is kept until then) of the stages before the last one."""
    stages = evit.stages(STEPS, keep, START, SHRINK, levels)
    ends = [first / STEPS for first, _ in stages[1:]]
    return tuple(zip(ends, [rate for _, rate in stages], strict=False))


def recipe(scratch: bool) -> ConfigDict:
    """The authors' recipe without models."""
    c = gpt4image.strong(gpt4image.recipe(GPUS, SHARE))
    c.epochs = 300.0 if scratch else 30.0
    c.data.repeats = 3
    c.optimizer.name, c.optimizer.weight_decay = "adamw", 0.05 if scratch else 1e-6
    c.optimizer.lr = (5e-4 if scratch else 2e-5) * GPUS * SHARE / 512
    c.optimizer.options = ConfigDict({"no_decay": ("pos_embed", "cls_token")})
    c.schedule.warmup_epochs, c.schedule.warmup_lr = 5.0 if scratch else 0.0, 1e-6
    c.schedule.min_lr = 1e-5 if scratch else 2e-6
    c.schedule.behind = 1.0
    c.ema = (0.99996,)
    return c


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, keep=0.7, fuse=True, scratch=False, levels=6, smoke=False)
    c = recipe(options.scratch)
    blocks = (0, 1) if options.smoke else BLOCKS
    reduce = dict(method="research.tokens.evit", keep_rate=options.keep, blocks=blocks, fuse=options.fuse)
    small = SMALL if options.smoke else {}
    student = common.student(
        MODEL,
        dtype="float32" if options.smoke else "bfloat16",
        options={"drop_path": 0.1 if options.scratch else 0.0, "reduce": reduce, **small},
        label_loss="ce",
        smoothing=0.1,
    )
    if options.scratch:
        # In a smoke test the first of two steps is dense.
        points = ((1e-2, 1.0),) if options.smoke else rates(options.keep, options.levels)
        student.stages = ConfigDict({"reduce": {"keep_rate": points}})
    elif not options.smoke:  # fine-tuning starts from something
        student.weights = config_dict.required_placeholder(str)
    c.students = common.arms(evit=student)
    return imagenet.smoke(c) if options.smoke else c
