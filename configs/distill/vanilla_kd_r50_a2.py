"""VanillaKD, ResNet-50 student, recipe A2 (300 epochs), BEiTv2-B teacher.

Command:    python -m launch.train --config configs/distill/vanilla_kd_r50_a2.py \\
              --config.data.path=/data/imagenet --config.teacher.weights=beitv2_base_patch16_224.safetensors
            (":teacher=beitv2_large", ":teacher=resnet152", ":arms=none+kd+dkd+dist", ":smoke")
Hardware:   8 H200 about 2.3 h, or a v5e-256 about 22 min (estimated at 35 % MFU with one arm; not run here)
Published:  top-1 / top-5 83.08 / 96.35 after 4,800 epochs (model zoo); none read for 300 epochs
"""

from configs.distill import imagenet


def get_config(arg: str = ""):
    return imagenet.config(arg, "resnet50", "a2", bn_group=imagenet.SHARE)
