"""OFA-KD on ImageNet, ResNet-50 student, recipe A2 of "ResNet strikes back" (300 epochs).

Command:    python -m launch.train --config configs/distill/ofa_imagenet_stronger.py:pair=vit_b-resnet50 \\
              --config.data.path=/data/imagenet --config.teacher.weights=vit_base_patch16_224.safetensors
            (":pair=" vit_b, swin_b or deit_t, "-resnet50"; ":eps=1.2", ":arms=kd+ofa", ":smoke")
Hardware:   8 H200 about 2.5 h with ViT-B (estimated at 35 % MFU; not run here)
Published:  ResNet-50 of a ViT-B teacher 0.41 above that of a ResNet-152 teacher, the figures themselves not read
"""

from configs.distill import ofa


def get_config(arg: str = ""):
    return ofa.config(arg, "imagenet_stronger", "vit_b-resnet50")
