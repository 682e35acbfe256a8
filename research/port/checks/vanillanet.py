"""Golden checks of VanillaNet: both forms, the merge between them, and what its recipe trains with."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.backbones import vanillanet
from research.core import optim, schedules
from research.distill import losses
from research.port.checks import common
from research.port.names import to_official
from research.port.verify import Golden

RULES = vanillanet.NAMES["official"]
ARGUMENTS = {"dims", "strides", "act_num", "ada_pool", "num_classes"}


def _model(golden: Golden, **changes) -> vanillanet.VanillaNet:
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in golden.kwargs.items() if k in ARGUMENTS}
    kept = {k: v for k, v in kept.items() if v is not None}
    return vanillanet.build(**{**kept, "dtype": jnp.float64, **changes})


def _at(weights: dict, slope) -> dict:
    return {**weights, "schedule": {"slope": jnp.asarray(slope, jnp.float64)}}


def eval_form(golden: Golden) -> dict:
    """Logits, stem and stages of the train form at the slopes that the names of the outputs state."""
    model = _model(golden)
    weights = common.variables(golden, vanillanet, model)
    apply = jax.jit(model.apply)
    outputs = {}
    for text in {name.rpartition("_act")[2] for name in golden.y}:
        logits, endpoints = apply(_at(weights, float(text)), common.nhwc(golden.x["image"]))
        maps = {f"stage{index}": endpoints[f"block{index + 1:02d}"] for index in range(len(model.strides))}
        maps |= {"logits": logits, "stem": endpoints["stem"]}
        outputs |= {f"{name}_act{text}": common.nchw(value) for name, value in maps.items()}
    return outputs


def switch_to_deploy(golden: Golden) -> dict:
    """The merged tensors under their official names, and the logits of the deploy form."""
    merged = jax.jit(vanillanet.merge)(common.variables(golden, vanillanet, _model(golden)))
    logits, _ = jax.jit(_model(golden, deploy=True).apply)(merged, common.nhwc(golden.x["image"]))
    return {"logits_deploy": logits} | {f"deploy.{name}": v for name, v in to_official(merged, RULES).items()}


def train_mode(golden: Golden) -> dict:
    """One training pass: logits, loss, all gradients, and the running statistics after it."""
    model, cotangent = _model(golden), jnp.asarray(golden.x["cotangent"])
    weights = common.variables(golden, vanillanet, model)
    slope = golden.meta.get("act_learn", golden.kwargs.get("act_learn", 1.0))

    def loss(params, image):
        variables = _at({**weights, "params": params}, slope)
        (logits, _), new = model.apply(variables, common.nhwc(image), train=True, mutable=["batch_stats"])
        return jnp.sum(logits * cotangent), (logits, new)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, (logits, new)), (params, image) = gradient(weights["params"], jnp.asarray(golden.x["image"]))
    outputs = {"logits": logits, "loss": value, "grad_image": image}
    outputs |= {f"grad.{name}": v for name, v in to_official({"params": params}, RULES).items()}
    return outputs | {f"buf.{name}": v for name, v in to_official(new, RULES).items()}


def rates(golden: Golden) -> dict:
    """Slope of each epoch and learning rate of each step, `lr` written as the call of the official function."""
    epochs = jnp.asarray(golden.x["epoch"])
    options = {"steps_per_epoch": 1, "decay_epochs": golden.kwargs["decay_epochs"]}
    outputs = {f"act_learn_{c}": vanillanet.slope(epochs, **options, curve=c) for c in ("linear", "cosine")}
    call = ast.parse(golden.kwargs["lr"], mode="eval").body
    names = ("lr", "min_lr", "epochs", "niter_per_ep", "warmup_epochs", "start_warmup_value", "warmup_steps")
    stated = dict(zip(names, call.args, strict=False)) | {keyword.arg: keyword.value for keyword in call.keywords}
    stated = {name: ast.literal_eval(value) for name, value in stated.items()}
    per_epoch, warmup_steps = stated["niter_per_ep"], stated.get("warmup_steps", -1)
    rate = schedules.schedule(
        "cosine",
        lr=stated.get("lr", stated.get("base_value")),
        min_lr=stated.get("min_lr", stated.get("final_value")),
        steps=stated["epochs"] * per_epoch,
        steps_per_epoch=per_epoch,
        warmup_epochs=warmup_steps / per_epoch if warmup_steps > 0 else stated.get("warmup_epochs", 0),
        warmup_lr=stated.get("start_warmup_value", 0.0),
        warmup_prefix=True,
        warmup_reaches=True,
        per_step=True,
    )
    return outputs | {"lr": jax.vmap(rate)(jnp.arange(golden.y["lr"].size))}


def lamb(golden: Golden) -> dict:
    """Parameters after each step; the group without decay is marked by the names of its tensors."""
    options = golden.kwargs
    tx = optim.optimizer(
        "lamb",
        options["lr"],
        weight_decay=options["weight_decay"],
        no_decay=("^nodecay",),
        decay_anyway=("^decay",),
        b1=options["betas"][0],
        b2=options["betas"][1],
        eps=options["eps"],
        max_grad_norm=options.get("max_grad_norm") or 0.0,
    )
    names = [name.removeprefix("param0.") for name in golden.x if name.startswith("param0.")]
    params = {name: jnp.asarray(golden.x[f"param0.{name}"]) for name in names}
    state, outputs = tx.init(params), {}
    for step in range(sum(name.endswith(f".{names[0]}") and name.startswith("grad") for name in golden.x)):
        grads = {name: jnp.asarray(golden.x[f"grad{step}.{name}"]) for name in names}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        outputs |= {f"param{step + 1}.{name}": value for name, value in params.items()}
    return outputs


def bce(golden: Golden) -> dict:
    """The loss of soft targets, its gradient, and that of labels smoothed by what the output's name states."""
    logits, target, label = (jnp.asarray(golden.x[name]) for name in ("logits", "soft_target", "label"))
    loss = lambda z, y, **options: jnp.mean(losses.LABEL_LOSSES["bce"](z, y, **options))
    value, gradient = jax.value_and_grad(loss)(logits, target)
    outputs = {"loss_soft": value, "grad_logits": gradient}
    for name in golden.y:
        if found := re.fullmatch(r"loss_labels_smooth([\d.]+)", name):
            outputs[name] = loss(logits, label, smoothing=float(found[1]))
    return {name: np.asarray(value) for name, value in outputs.items()}


CHECKS = {
    "train_form_eval": eval_form,
    "switch_to_deploy": switch_to_deploy,
    "train_mode": train_mode,
    "schedules": rates,
    "lamb": lamb,
    "bce": bce,
}
