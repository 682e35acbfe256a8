"""VanillaKD, ResNet-50 student, recipe A1 (600 epochs), BEiTv2-B teacher.

Command:    python -m launch.train --config configs/distill/vanilla_kd_r50_a1.py \\
              --config.data.path=/data/imagenet --config.teacher.weights=beitv2_base_patch16_224.safetensors
            (":teacher=beitv2_large", ":teacher=resnet152", ":arms=none+kd+dkd+dist", ":smoke")
Hardware:   8 H200 about 4.6 h, or a v5e-256 about 43 min (estimated at 35 % MFU with one arm; not run here)
Published:  top-1 / top-5 83.08 / 96.35 after 4,800 epochs (model zoo); none read for 600 epochs
"""

from configs.distill import imagenet


def get_config(arg: str = ""):
    return imagenet.config(arg, "resnet50", "a1", bn_group=imagenet.SHARE)
