"""OFA-KD on CIFAR-100 at 224 pixels, DeiT-T, Swin-P and ResMLP-S12 students of other families, 300 epochs.

Command:    python -m launch.train --config configs/distill/ofa_cifar_tokens.py:pair=convnext_t-resmlp_s12 \\
              --config.data.path=/data/cifar100 --config.teacher.weights=convnext_tiny_cifar100.safetensors
            (":pair=" convnext_t or mixer_b, "-" deit_t or swin_p; convnext_t or swin_t, "-resmlp_s12"; ":eps=1.2",
            ":arms=none+kd+ofa", ":smoke")
Hardware:   1 H200 about 1 h (estimated at 20 % MFU; not run here)
Data:       {train,test}/<class>/<n>.png; teachers are the authors', ImageNet networks tuned on CIFAR-100
Published:  top-1 of the best epoch, teacher / student alone -> KD, OFA; users report several as not reproducible
            DeiT-T (68.00):     ConvNeXt-T 88.41 -> 72.99, 75.76; Mixer-B 87.29 -> 71.36, 73.90
            Swin-P (72.63):     ConvNeXt-T -> 76.44, 78.32; Mixer-B -> 75.93, 78.93
            ResMLP-S12 (66.56): ConvNeXt-T -> 72.25, 81.22; Swin-T 89.26 -> 71.89, 80.63
"""

from configs.distill import ofa


def get_config(arg: str = ""):
    return ofa.config(arg, "cifar_tokens", "convnext_t-resmlp_s12")
