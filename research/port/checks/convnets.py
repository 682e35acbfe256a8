"""Golden checks of convolutional networks under the names of distillation code bases."""

import jax.numpy as jnp

from research.backbones import cifar_resnet, convnext
from research.port.checks import common
from research.port.verify import Golden


def check_cifar_resnet(golden: Golden) -> dict:
    """mdistiller's CIFAR ResNets: logits, features before and after the last ReLU, gradient of the summed logits.

    The constructor only gives the number of classes, so depth and widths are read off the weights.
    """
    convolutions = {name: array.shape for name, array in golden.w.items() if name.endswith("conv1.weight")}
    stages = len({name.split(".")[0] for name in convolutions if name.startswith("layer")})
    head = "linear" if "linear.weight" in golden.w else "fc"
    model = cifar_resnet.build(
        block="bottleneck" if "layer1.0.conv3.weight" in golden.w else "basic",
        layers=tuple(sum(name.startswith(f"layer{k}.") for name in convolutions) for k in range(1, stages + 1)),
        channels=tuple(convolutions[f"layer{k}.0.conv1.weight"][0] for k in range(1, stages + 1)),
        stem_width=convolutions["conv1.weight"][0],
        num_classes=golden.w[f"{head}.weight"].shape[0],
        dtype=jnp.float64,
    )
    dialect = "mdistiller" if head == "fc" else "shortcut"
    outputs, endpoints = common.with_gradient(golden, cifar_resnet, model, dialect)
    # Both official lists start with the stem after its ReLU.
    outputs |= {"pooled_feat": endpoints["pooled"]}
    outputs |= {name: common.nchw(endpoints["stem"]) for name in ("feat_0", "preact_feat_0")}
    for k in range(1, stages + 1):
        outputs[f"feat_{k}"] = common.nchw(endpoints[f"stage{k}"])
        outputs[f"preact_feat_{k}"] = common.nchw(endpoints[f"stage{k}_preact"])
    return outputs


def check_convnextv2(golden: Golden) -> dict:
    """VanillaKD's ConvNeXtV2 under the authors' names: pooled features, logits, gradient of the summed logits."""
    shapes = {"depths", "dims", "num_classes"} & set(golden.kwargs)
    kwargs = {k: tuple(v) if isinstance(v := golden.kwargs[k], list) else v for k in shapes}
    model = convnext.build(use_grn=True, ls_init_value=None, dtype=jnp.float64, **kwargs)
    outputs, endpoints = common.with_gradient(golden, convnext, model, "official")
    return {**outputs, "features": endpoints["pooled"]}
