"""VanillaKD, ViT-L/16 student under fsdp, recipe A2 (300 epochs), BEiTv2-B teacher.

Command:    python -m launch.train --config configs/distill/vanilla_kd_vit_l_a2.py \\
              --config.data.path=/data/imagenet --config.teacher.weights=beitv2_base_patch16_224.safetensors
            (":teacher=beitv2_large", ":teacher=resnet152", ":arms=none+kd+dkd+dist", ":smoke")
Hardware:   see the scale study in launch/README.md (compiled for v5e pods; not run here)
Published:  none: the paper's students end at ViT-S; this one shows how a large model is spread over a pod
Parameters, optimiser and teacher are split over 8 chips (`parallel.axes.fsdp`), the batch over all.
"""

from configs.distill import imagenet


def get_config(arg: str = ""):
    c = imagenet.config(arg, "vit_large_patch16_224", "a2")
    c.parallel.axes.fsdp = 1 if "smoke" in arg.split(",") else 8
    c.parallel.rules = ((".*", "fsdp"),)
    return c
