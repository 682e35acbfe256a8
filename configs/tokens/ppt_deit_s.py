"""PPT on DeiT-S, fine-tuned from DeiT's checkpoint by the authors' script, 30 epochs.

Command:    python -m launch.train --config configs/tokens/ppt_deit_s.py --config.data.path=/data/imagenet \\
              --config.students.ppt.weights=deit_small_patch16_224.safetensors
            (":arms=none+ppt+prune+pool+reverse", each with `weights`; ":r=40,threshold=6e-5"; ":smoke")
            Off the shelf: python -m launch.evaluate --model deit_small_patch16_224 --data /data/imagenet --split val \\
              --weights deit_small_patch16_224.safetensors --reduce ppt:r=50,blocks=3+6+9,threshold=7e-5 \\
              --crop 0.875  (the authors'; timm evaluates these weights at 0.9)
Hardware:   1 H200 about 40 min (estimated at 30 % MFU with one arm, if 17000 images a second arrive; not run here)
Published:  top-1 79.8 at 2.94 G multiply-adds, 79.5 off the shelf (threshold 7e-5), dense 79.8 at 4.60 G

The arm `none` is fine-tuned alike with all tokens; `reverse` prunes where PPT pools. As officially, the weights that
count are the last ones, not their moving average, which is kept beside them.
"""

from ml_collections import ConfigDict, config_dict

from configs import common
from configs.distill import gpt4image, imagenet
from research.core.config import parse_arg
from research.core.errors import UserError

MODEL = "deit_small_patch16_224"
BLOCKS = (3, 6, 9)
GPUS, SHARE = 4, 256
ARMS = {"none": "", "ppt": "adaptive", "prune": "prune", "pool": "pool", "reverse": "reverse"}
SMALL = dict(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=3)


def recipe() -> ConfigDict:
    """The authors' recipe without models."""
    c = gpt4image.strong(gpt4image.recipe(GPUS, SHARE))
    c.epochs = 30.0
    c.data.repeats = 3
    c.optimizer.name, c.optimizer.weight_decay = "adamw", 0.05
    c.optimizer.lr = 1e-5 * GPUS * SHARE / 512
    c.optimizer.options = ConfigDict({"no_decay": ("pos_embed", "cls_token")})
    c.schedule.warmup_epochs, c.schedule.warmup_lr, c.schedule.min_lr = 5.0, 1e-6, 1e-5
    c.schedule.behind = 1.0
    c.ema = (0.99996,)
    return c


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, arms="ppt", r=50, threshold=6e-5, smoke=False)
    names = options.arms.split("+")
    if unknown := [name for name in names if name not in ARMS]:
        raise UserError(f"config argument arms: no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    c = recipe()
    blocks, r = ((0, 1), 5) if options.smoke else (BLOCKS, options.r)
    shared = dict(label_loss="ce", smoothing=0.1, dtype="float32" if options.smoke else "bfloat16")
    students = {}
    for name in names:
        spec = dict(method="research.tokens.ppt", r=r, blocks=blocks, threshold=options.threshold, policy=ARMS[name])
        chosen = {"drop_path": 0.1, **(SMALL if options.smoke else {}), **({"reduce": spec} if ARMS[name] else {})}
        students[name] = common.student(MODEL, **shared, options=chosen)
        if not options.smoke:  # fine-tuning starts from something
            students[name].weights = config_dict.required_placeholder(str)
    c.students = common.arms(**students)
    return imagenet.smoke(c) if options.smoke else c
