"""Golden checks of VanillaKD's recipe: schedule, optimiser, targets and losses."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core import optim, schedules
from research.data import mixup
from research.distill import losses
from research.port.checks.convnets import check_convnextv2
from research.port.checks.transformers import check_vanillakd_beit
from research.port.verify import Golden


def lr_schedule(golden: Golden) -> dict[str, np.ndarray]:
    """The learning rate during each epoch of every recipe in the file."""

    def rates(recipe, lr, epochs, **options):
        options = {k: v for k, v in options.items() if k in ("warmup_lr", "warmup_epochs", "min_lr", "warmup_prefix")}
        rate = schedules.schedule("cosine", lr=lr, steps=epochs * 10, steps_per_epoch=10, **options)
        return jax.vmap(rate)(10 * jnp.arange(golden.y[f"lr_{recipe}"].size) + 3)

    return {f"lr_{recipe}": rates(recipe, **kwargs) for recipe, kwargs in golden.kwargs.items()}


def lamb(golden: Golden) -> dict[str, np.ndarray]:
    """Parameters after each step of timm's LAMB, with the file's gradients and learning rates."""
    rates = jnp.asarray(golden.x["lr"] if "lr" in golden.x else golden.kwargs["lr_per_step"])
    tx = optim.optimizer(
        "lamb",
        lambda step: rates[step],
        weight_decay=golden.kwargs["weight_decay"],
        no_decay=(*golden.kwargs.get("no_weight_decay", ("^tok$",)), r"\.bias$"),
    )
    params = {name: jnp.asarray(value) for name, value in golden.w.items()}
    state, outputs = tx.init(params), {}
    for step in range(len(rates)):
        grads = {name: jnp.asarray(golden.x[f"grad_{step}_{name}"]) for name in params}
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        outputs |= {f"param_{step}_{name}": value for name, value in params.items()}
    return outputs


def mixup_cutmix(golden: Golden) -> dict[str, np.ndarray]:
    """Mixed images and targets for the file's lam and box; the cutmix target has the corrected lam."""
    images = jnp.moveaxis(jnp.asarray(golden.x["image"]), 1, -1)
    labels, lam = jnp.asarray(golden.x["target"]), jnp.asarray(golden.x["lam"])
    box = tuple(golden.x["cutmix_bbox_yl_yh_xl_xh"])
    corrected = mixup.corrected_lam(box, *images.shape[1:3], dtype=lam.dtype)
    options = {
        "num_classes": golden.kwargs.get("num_classes") or golden.y["target_mixup"].shape[-1],
        "smoothing": golden.kwargs.get("label_smoothing", 0.1),
    }
    return {
        "image_mixup": jnp.moveaxis(mixup.mixup(images, lam), -1, 1),
        "image_cutmix": jnp.moveaxis(mixup.cutmix(images, box), -1, 1),
        "cutmix_corrected_lam": corrected,
        "target_mixup": mixup.mixed_target(labels, lam, **options),
        "target_cutmix": mixup.mixed_target(labels, corrected, **options),
    }


def recipe_loss(golden: Golden) -> dict[str, np.ndarray]:
    """Mixed targets of each recipe; label loss, teacher loss, their weighted sum and its gradient for every pairing."""
    student, teacher = jnp.asarray(golden.x["logits_student"]), jnp.asarray(golden.x["logits_teacher"])
    kwargs = golden.kwargs
    label_weight, loss_weight = kwargs.get("weights", (1, 1))
    tempered = {"temperature": kwargs.get("temperature", 1.0)}
    options = {"kd": tempered, "dkd": tempered, "dist": tempered, "bkd": {}}
    label_options = {"bce": {"threshold": kwargs.get("bce_target_thresh")}, "ce": {}}

    def terms(s, target, label, loss):
        ori = jnp.mean(losses.LABEL_LOSSES[label](s, target, **label_options[label]))
        kd = jnp.mean(losses.LOSSES[loss](s, teacher, target, **options[loss]))
        return label_weight * ori + loss_weight * kd, (ori, kd)

    outputs = {}
    for key in [key for key in golden.y if key.endswith("_target")]:
        recipe, classes = key.removesuffix("_target"), student.shape[-1]
        target = mixup.mixed_target(
            jnp.asarray(golden.x["target"]),
            jnp.asarray(golden.x["lam"]),
            num_classes=classes,
            smoothing=kwargs[f"smoothing_{recipe}"],
        )
        outputs[key] = target
        for label, loss in itertools.product(label_options, options):
            (total, parts), gradient = jax.value_and_grad(terms, has_aux=True)(student, target, label, loss)
            found = zip(("loss_ori", "loss_kd", "loss", "grad"), (*parts, total, gradient), strict=True)
            outputs |= {f"{name}_{recipe}_{label}_{loss}": value for name, value in found}
    return outputs


CHECKS = {
    "beit": check_vanillakd_beit,
    "convnextv2": check_convnextv2,
    "lamb": lamb,
    "lr_schedule": lr_schedule,
    "mixup_cutmix": mixup_cutmix,
    "recipe_loss": recipe_loss,
}
