"""OFA-KD on ImageNet, DeiT-T, Swin-N and ResMLP-S12 students of teachers of other families, 300 epochs.

Command:    python -m launch.train --config configs/distill/ofa_imagenet_tokens.py:pair=resnet50-deit_t \\
              --config.data.path=/data/imagenet --config.teacher.weights=resnet50_a1.safetensors
            (":pair=" resnet50, convnext_t or mixer_b, "-" deit_t or swin_n; resnet50, convnext_t or swin_t, "-"
            resmlp_s12; ":eps=1.2", ":arms=none+kd+ofa", ":smoke")
Hardware:   8 H200 about 1 h (estimated at 35 % MFU; not run here)
Published:  top-1 of the best epoch, teacher / student alone -> KD, OFA
            DeiT-T (72.17):     ResNet-50 80.38 -> 75.10, 76.55; ConvNeXt-T 82.05 -> 74.00, 74.41; Mixer-B 76.62 ->
                                74.16, 74.46
            Swin-N (75.53):     ResNet-50 -> 77.58, 78.64; ConvNeXt-T -> 77.15, 77.50; Mixer-B -> 76.26, 76.63
            ResMLP-S12 (76.65): ResNet-50 -> 77.41, 78.53; ConvNeXt-T -> 76.84, 77.53; Swin-T 81.38 -> 76.67, 77.31
"""

from configs.distill import ofa


def get_config(arg: str = ""):
    return ofa.config(arg, "imagenet_tokens", "resnet50-deit_t")
