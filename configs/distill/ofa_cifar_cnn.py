"""OFA-KD on CIFAR-100 at 224 pixels, ResNet-18 and MobileNetV2 students of transformer and MLP teachers, 300 epochs.

Command:    python -m launch.train --config configs/distill/ofa_cifar_cnn.py:pair=swin_t-resnet18 \\
              --config.data.path=/data/cifar100 --config.teacher.weights=swin_tiny_cifar100.safetensors
            (":pair=" swin_t, vit_s or mixer_b, "-" resnet18 or mobilenetv2; ":eps=1.2", ":arms=none+kd+ofa", ":smoke")
Hardware:   1 H200 about half an hour (estimated at 20 % MFU; not run here)
Data:       {train,test}/<class>/<n>.png; teachers are the authors', ImageNet networks tuned on CIFAR-100
Published:  top-1 of the best epoch, teacher / student alone -> KD, OFA; users report several as not reproducible
            ResNet-18 (74.01):   Swin-T 89.26 -> 78.74, 80.54; ViT-S 92.04 -> 77.26, 80.15; Mixer-B 87.29 ->
                                 77.79, 79.39
            MobileNetV2 (73.68): Swin-T -> 74.68, 80.98; ViT-S -> 72.77, 78.45; Mixer-B -> 73.33, 78.78
"""

from configs.distill import ofa


def get_config(arg: str = ""):
    return ofa.config(arg, "cifar_cnn", "swin_t-resnet18")
