"""GPUSQ-ViT in small on real photographs: 2:4 sparsity, then 8 and 4 bits, each with and without what the method adds.

Command:    python -m launch.train --config configs/tokens/cifar_small.py:teacher --workdir runs/tokens_dense \\
              --config.data.path=cifar10.zip
            python -m launch.train --config configs/quantize/gpusq_vit_small.py --workdir runs/gpusq_prune \\
              --config.data.path=cifar10.zip --config.teacher.workdir=runs/tokens_dense
            python -m launch.train --config configs/quantize/gpusq_vit_small.py:stage=quantize \\
              --workdir runs/gpusq_quantize --config.data.path=cifar10.zip --config.teacher.workdir=runs/tokens_dense \\
              --config.teacher.ensemble.sparse.weights=runs/gpusq_prune/weights/sparse.safetensors
            (":arms=" some of configs/quantize/gpusq.py's joined by "+", "pairs_int4" with the weights of "pairs";
            --config.seed=1; ":smoke")
Hardware:   2 CPU cores; times in research/quantize/README.md
Data:       {train,test}/<class>/<n>.jpg of 32x32 pixels, 10 classes, in a zip or a folder
Published:  nothing of this size; on ImageNet 6.4 to 12.7 times smaller with negligible loss of accuracy

All arms start from the weights of one dense network, which configs/tokens/cifar_small.py:teacher trains, or of the
sparse one that stage 1 made of it, and are fine-tuned alike; `dense` stays dense and `sparse_labels` learns from labels
alone. Every arm is also scored as `<arm>_oneshot`, pruned and rounded without training.
"""

from ml_collections import ConfigDict

from configs import common
from configs.quantize import gpusq
from configs.tokens.cifar_small import SHAPE, SMALL
from research.core.config import parse_arg

MODEL = "vit_tiny_patch16_224"
ARMS = {"prune": "dense+sparse+sparse_labels", "quantize": "sparse_int8+sparse_int4+int4"}


def get_config(arg: str = "") -> ConfigDict:
    options = parse_arg(arg, stage="prune", arms="", smoke=False)
    shape = SMALL if options.smoke else SHAPE
    late = tuple(f"block{number:02d}" for number in range(shape["depth"] - 1, shape["depth"] + 1))
    c = common.base()
    c.batch_size = 64
    c.epochs = 3.0
    c.data.kind = "zip"
    c.augment.size = c.eval.size = shape["img_size"]
    c.augment.crop, c.augment.pad = "pad", shape["img_size"] // 8
    c.eval.crop = 1.0
    c.eval.every = c.save.every = 3.0
    c.log.every = 52
    c.optimizer.lr, c.optimizer.clip = 2e-4, 5.0
    c.schedule.warmup_epochs, c.schedule.warmup_lr = 0.5, 1e-6
    c.schedule.min_lr = 0.0
    c.schedule.per_step = True
    names = options.arms or ARMS.get(options.stage, "")
    c = gpusq.fill(c, options.stage, names, MODEL, shape, late, "float32")
    c.teacher.recipe = "configs/tokens/cifar_small.py:teacher"
    if not options.smoke:
        return c
    c = common.smoke(c, size=shape["img_size"])
    for sparse in c.teacher.ensemble.values():
        sparse.weights = "random"
    return c
