"""GPUSQ-ViT on DeiT-S: pruned to 2:4, then rounded to 8 and 4 bits, from DeiT's checkpoint.

Command:    python -m launch.train --config configs/quantize/gpusq_deit_s.py --config.data.path=/data/imagenet \\
              --workdir runs/gpusq_prune --config.teacher.weights=deit_small_patch16_224.safetensors
            python -m launch.train --config configs/quantize/gpusq_deit_s.py:stage=quantize \\
              --config.data.path=/data/imagenet --config.teacher.weights=deit_small_patch16_224.safetensors \\
              --config.teacher.ensemble.sparse.weights=runs/gpusq_prune/weights/sparse.safetensors
            (":arms=" some of configs/quantize/gpusq.py's joined by "+"; ":model=deit_base_patch16_224"; ":smoke")
Hardware:   1 H200 about 80 min for stage 1, 160 for both arms of stage 2 (estimated at 30 % MFU; not run here)
Published:  6.4 (8 bits) and 12.7 (4 bits) times smaller; top-1 80.3 with 8 bits (dense 79.9) as notes on the paper say

The losses' weights are the authors'; their schedule could not be read, so that this one, 30 epochs of a stage with
DeiT's augmentation but no mixing, at a tenth of its learning rate, is ours. What tensor cores of Ampere take for 4 bits
are the arms `pairs` and, from its weights, `pairs_int4`.
"""

from ml_collections import ConfigDict

from configs import common
from configs.distill import gpt4image
from configs.quantize import gpusq
from research.backbones import vit
from research.core.config import parse_arg

GPUS, SHARE = 8, 128
ARMS = {"prune": "sparse", "quantize": "sparse_int8+sparse_int4"}
SMALL = dict(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2)


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, model="deit_small_patch16_224", stage="prune", arms="", smoke=False)
    shape = SMALL if options.smoke else {}
    depth = vit.build(**{**vit.VARIANTS[options.model], **shape}).depth
    late = tuple(f"block{number:02d}" for number in range(depth - depth // 3 + 1, depth + 1))
    c = gpt4image.strong(gpt4image.recipe(GPUS, SHARE))
    c.epochs = 30.0
    c.mix.mixup = c.mix.cutmix = 0.0
    c.optimizer.lr, c.optimizer.weight_decay = 1e-4, 0.05
    c.optimizer.options = ConfigDict({"no_decay": ("pos_embed", "cls_token")})
    c.schedule.warmup_epochs, c.schedule.min_lr = 1.0, 1e-6
    names, dtype = options.arms or ARMS.get(options.stage, ""), "float32" if options.smoke else "bfloat16"
    c = gpusq.fill(c, options.stage, names, options.model, shape, late, dtype)
    c.distill.smoothing = 0.1
    if not options.smoke:
        return c
    c = common.smoke(c)
    c.data.num_classes, c.data.workers, c.mix.group = 10, 0, 8
    for teacher in (c.teacher, *c.teacher.ensemble.values()):
        teacher.weights = "random"
    return c
