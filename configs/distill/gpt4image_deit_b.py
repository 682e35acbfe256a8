"""GPT4Image, DeiT-B/16: captions of the training images as targets beside the labels, DeiT's recipe, 300 epochs.

Command:    python -m research.distill.text_targets --embeddings captions.npy --path /data/imagenet --out targets.npz
            python -m launch.train --config configs/distill/gpt4image_deit_b.py \\
              --config.data.path=/data/imagenet --config.teacher.text=targets.npz
            (":arms=text", ":loss=ctr", ":smoke"); captions.npy: CLIP RN50 embeddings of one caption an image
Hardware:   8 H200 about 8 h with both arms (estimated at 35 % MFU; not run here); the targets take 2.6 GB a device
Published:  top-1 about 82.3 (README), 81.8 without text (DeiT's paper)
"""

from ml_collections import ConfigDict

from configs.distill import gpt4image

GPUS, SHARE = 8, 128


def get_config(arg: str = "") -> ConfigDict:
    c = gpt4image.strong(gpt4image.recipe(GPUS, SHARE))
    c.epochs = 300.0
    c.data.repeats = 3
    c.eval.crop = 1.0
    c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay = "adamw", 1e-3, 0.05
    c.optimizer.options = ConfigDict({"no_decay": ("pos_embed", "cls_token")})
    c.schedule.warmup_epochs, c.schedule.warmup_lr = 5.0, 1e-6
    c.schedule.behind = 1.0
    c.ema = (0.99996,)
    return gpt4image.config(arg, c, "deit_base_patch16_224", GPUS, gpt4image.DEIT, smoothing=0.1, drop_path=0.1)
