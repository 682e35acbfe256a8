"""GPT4Image, ResNet-50: captions of the training images as targets beside the labels, 120 epochs.

Command:    python -m research.distill.text_targets --embeddings captions.npy --path /data/imagenet --out targets.npz
            python -m launch.train --config configs/distill/gpt4image_r50.py \\
              --config.data.path=/data/imagenet --config.teacher.text=targets.npz
            (":arms=text", ":loss=ctr", ":smoke"); captions.npy: CLIP RN50 embeddings of one caption an image
Hardware:   8 H200 about 1 h with both arms, bound by decoding (estimated; not run here); the targets take 2.6 GB a
            device
Published:  top-1 about 72.8 (README), below the 76 to 77 that is usual of this recipe without text: not a number to
            reproduce; the text's arm should not be below the plain one
"""

from ml_collections import ConfigDict

from configs.distill import gpt4image

GPUS, SHARE = 4, 256


def get_config(arg: str = "") -> ConfigDict:
    c = gpt4image.recipe(GPUS, SHARE)
    c.epochs = 120.0
    c.augment.interpolation = "bilinear"
    c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay = "sgd", 0.4, 1e-4
    c.optimizer.options = ConfigDict({"decay_anyway": (".",)})  # norms and biases too
    c.schedule.warmup_epochs = 0.0
    return gpt4image.config(
        arg, c, "resnet50", GPUS, gpt4image.RESNET, smoothing=0.0, bn_group=SHARE, zero_init_last=False
    )
