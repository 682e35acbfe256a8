"""GPT4Image, ConvNeXt-T: captions of the training images as targets beside the labels, ConvNeXt's recipe, 300 epochs.

The authors released no code for ConvNeXt: the text head and temperature are those of their DeiT.

Command:    python -m research.distill.text_targets --embeddings captions.npy --path /data/imagenet --out targets.npz
            python -m launch.train --config configs/distill/gpt4image_convnext_t.py \\
              --config.data.path=/data/imagenet --config.teacher.text=targets.npz
            (":arms=text", ":loss=ctr", ":smoke"); captions.npy: CLIP RN50 embeddings of one caption an image
Hardware:   8 H200 about 2 h with both arms (estimated at 35 % MFU; not run here); the targets take 2.6 GB a device
Published:  none read with text; 82.1 without (ConvNeXt's paper)
"""

from ml_collections import ConfigDict

from configs.distill import gpt4image

GPUS, SHARE = 8, 512


def get_config(arg: str = "") -> ConfigDict:
    c = gpt4image.strong(gpt4image.recipe(GPUS, SHARE))
    c.epochs = 300.0
    c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay = "adamw", 4e-3, 0.05
    c.schedule.warmup_epochs, c.schedule.warmup_lr = 20.0, 0.0
    c.schedule.per_step, c.schedule.min_lr = True, 1e-6
    c.ema = (0.9999,)
    return gpt4image.config(arg, c, "convnext_tiny", GPUS, gpt4image.DEIT, smoothing=0.1, drop_path=0.1)
