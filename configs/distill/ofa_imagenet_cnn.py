"""OFA-KD on ImageNet, ResNet-18 and MobileNetV2 students of transformer and MLP teachers, 100 epochs.

Command:    python -m launch.train --config configs/distill/ofa_imagenet_cnn.py:pair=swin_t-resnet18 \\
              --config.data.path=/data/imagenet --config.teacher.weights=swin_tiny_patch4_window7_224.safetensors
            (":pair=" deit_t, swin_t or mixer_b, "-" resnet18 or mobilenetv2; ":eps=1.2", ":arms=none+kd+ofa", ":smoke")
Hardware:   8 H200 about 1 h, bound by decoding (estimated; not run here)
Published:  top-1 of the best epoch, teacher / student alone -> KD, OFA
            ResNet-18 (69.75):   DeiT-T 72.17 -> 70.22, 71.34; Swin-T 81.38 -> 71.14, 71.85; Mixer-B 76.62 ->
                                 70.89, 71.38
            MobileNetV2 (68.87): DeiT-T -> 70.87, 71.39; Swin-T -> 72.05, 72.32; Mixer-B -> 71.92, 72.12
"""

from configs.distill import ofa


def get_config(arg: str = ""):
    return ofa.config(arg, "imagenet_cnn", "deit_t-resnet18")
