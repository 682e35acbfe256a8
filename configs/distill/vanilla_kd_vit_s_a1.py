"""VanillaKD, ViT-S/16 student, recipe A1 (600 epochs), BEiTv2-B teacher.

Command:    python -m launch.train --config configs/distill/vanilla_kd_vit_s_a1.py \\
              --config.data.path=/data/imagenet --config.teacher.weights=beitv2_base_patch16_224.safetensors
            (":teacher=beitv2_large", ":teacher=resnet152", ":arms=none+kd+dkd+dist", ":smoke")
Hardware:   8 H200 about 4.8 h, or a v5e-256 about 46 min (estimated at 35 % MFU with one arm; not run here)
Published:  top-1 / top-5 84.33 / 97.09 after 4,800 epochs (model zoo); none read for 600 epochs
The repository holds no command for this student: recipe A1 is applied as to ResNet-50.
"""

from configs.distill import imagenet


def get_config(arg: str = ""):
    return imagenet.config(arg, "vit_small_patch16_224", "a1")
