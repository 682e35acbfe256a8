"""Golden checks of the distillation losses: values, gradients, running statistics and memories."""

import re

import jax
import jax.numpy as jnp

from research.distill import features, logits, memory, relations
from research.distill.ground_truth import cross_entropy
from research.distill.numerics import warmup
from research.port.checks import kdlosses_features, kdlosses_logits
from research.port.checks.common import nchw, nhwc
from research.port.checks.convnets import check_cifar_resnet
from research.port.checks.kdlosses_common import DTYPE, keep, name_gradients, value_and_gradient, variables
from research.port.verify import Golden


def check_kd(golden: Golden) -> dict:
    student, teacher, labels = golden.x["logits_student"], golden.x["logits_teacher"], jnp.asarray(golden.x["target"])
    temperature, alpha = golden.kwargs["T"], golden.kwargs["alpha"]
    kl = lambda s: jnp.mean(logits.kd(s, teacher, temperature=temperature))
    soft = lambda s: jnp.mean(logits.kd(s, teacher, temperature=temperature, entropy=False))
    mixed = lambda s, a: jnp.mean(logits.kd_and_labels(s, teacher, labels, temperature=temperature, alpha=a))
    losses = {
        "kl": kl,
        "kl_vanillakd": kl,
        "total_mdistiller": lambda s: (1 - alpha) * jnp.mean(cross_entropy(s, labels)) + alpha * kl(s),
        "torchdistill": lambda s: mixed(s, 1 - alpha),
        "torchdistill_alpha0": lambda s: mixed(s, 0),
        "clskd_ce_form": lambda s: alpha * soft(s),
        "bkd_vanillakd": lambda s: jnp.mean(logits.bkd(s, teacher)),
    }
    found = {}
    for name, loss in losses.items():
        found[f"loss_{name}"], found[f"grad_{name}"] = value_and_gradient(loss, student)
    found["grad_bkd"] = found["grad_bkd_vanillakd"]
    return keep(golden, found | _deit(golden, teacher, labels, temperature, alpha))


def _deit(golden: Golden, teacher, labels, temperature, alpha) -> dict:
    found = {}
    parts = {
        "soft": lambda s: jnp.mean(logits.kd(s, teacher, temperature=temperature, mean_classes=True)),
        "hard": lambda s: jnp.mean(logits.hard(s, teacher)),
    }
    for name, part in parts.items():
        total = lambda tokens, part=part: (
            (1 - alpha) * jnp.mean(cross_entropy(tokens[0], labels)) + alpha * part(tokens[1])
        )
        tokens = jnp.stack([golden.x["logits_class_token"], golden.x["logits_student"]])
        found[f"loss_deit_{name}"], gradient = value_and_gradient(total, tokens)
        found[f"grad_deit_{name}_class_token"], found[f"grad_deit_{name}_dist_token"] = gradient
    return found


def check_dkd(golden: Golden) -> dict:
    student, teacher, kwargs = golden.x["logits_student"], golden.x["logits_teacher"], golden.kwargs
    options = {"temperature": kwargs["T"], "alpha": kwargs["alpha"], "beta": kwargs["beta"]}
    loss = lambda labels: lambda s: jnp.mean(logits.dkd(s, teacher, labels, **options))
    target, soft = jnp.asarray(golden.x["target"]), jnp.asarray(golden.x["soft_target"])
    found = {}
    found["loss"], found["grad_logits_student"] = value_and_gradient(loss(target), student)
    found["loss_soft_target"], found["grad_soft_target"] = value_and_gradient(loss(soft), student)
    parts = logits.dkd_parts(jnp.asarray(student), teacher, target, temperature=kwargs["T"])
    found["tckd"], found["nckd"] = map(jnp.mean, parts)
    return keep(golden, found)


def check_dist(golden: Golden) -> dict:
    x, kwargs = golden.x, golden.kwargs
    weights = {"beta": kwargs["beta"], "gamma": kwargs["gamma"]}
    loss = lambda s: logits.dist(s, x["logits_teacher"], temperature=kwargs["tau"], **weights)
    dense = lambda s: logits.dist(nhwc(s), nhwc(x["seg_logits_teacher"]), **weights)
    found = dict(zip(("loss", "grad_logits_student"), value_and_gradient(loss, x["logits_student"]), strict=True))
    found["loss_seg"], found["grad_seg_logits_student"] = value_and_gradient(dense, x["seg_logits_student"])
    return keep(golden, found)


def check_cc(golden: Golden) -> dict:
    x, kwargs = golden.x, golden.kwargs
    pair = memory.EmbedPair(kwargs["feat_dim"], normalize=False, dtype=DTYPE)
    inputs = jnp.asarray(x["student"]), jnp.asarray(x["teacher"])
    params = variables(pair, golden.w, [], *inputs)["params"]

    def loss(params, student):
        return relations.cc(*pair.apply({"params": params}, student, inputs[1]), scale=kwargs["scale"])

    found = {}
    found["loss"], (gradients, found["grad_student"]) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, inputs[0])
    for kernel in ("gaussian", "bilinear"):
        options = {"kernel": kernel, "gamma": kwargs["gamma"], "order": kwargs["max_p"]}
        value = lambda s, options=options: relations.cc_kernel(s, x["embed_teacher"], **options)
        found[f"loss_cckd_{kernel}"], found[f"grad_cckd_{kernel}"] = value_and_gradient(value, x["embed_student"])
    return keep(golden, found | name_gradients(gradients, [], "gradw_"))


def check_rkd(golden: Golden) -> dict:
    student, teacher = (x.reshape(x.shape[0], -1) for x in (golden.x["student"], golden.x["teacher"]))
    loss = lambda s, **without: relations.rkd(s, teacher, **{**golden.kwargs, **without})
    value, gradient = value_and_gradient(loss, student)
    found = {"loss": value, "grad_student": gradient.reshape(golden.x["student"].shape)}
    # Each part is stated with its weight.
    found["loss_distance"] = loss(jnp.asarray(student), angle_weight=0)
    found["loss_angle"] = loss(jnp.asarray(student), distance_weight=0)
    return keep(golden, found)


def check_crd(golden: Golden) -> dict:
    x, kwargs = golden.x, golden.kwargs
    pair = memory.EmbedPair(kwargs["feat_dim"], dtype=DTYPE)
    weights = {name: value for name, value in golden.w.items() if name.startswith("embed_")}
    params = variables(pair, weights, [], x["step0_student"], x["step0_teacher"])["params"]
    rows = [jnp.asarray(golden.w[f"contrast.memory_v{k}"]) for k in (1, 2)]
    state = memory.Memory(*rows, jnp.zeros(2, DTYPE), jnp.zeros((), DTYPE))
    options = {"temperature": kwargs["temperature"], "momentum": kwargs["momentum"]}

    @jax.jit
    def step(params, student, teacher, state, index, negatives):
        def loss(params, student):
            embedded = pair.apply({"params": params}, student, teacher)
            value, new = memory.crd(*embedded, state, index, negatives, **options)
            return jnp.mean(value), new

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, student)

    found = {}
    for name in sorted({key.split("_")[0] for key in x if re.match(r"step\d+_", key)}, key=lambda n: int(n[4:])):
        negatives = jnp.asarray(x[f"{name}_contrast_index"])[:, 1:]
        inputs = (jnp.asarray(x[f"{name}_{part}"]) for part in ("student", "teacher"))
        (value, state), (gradients, gradient) = step(params, *inputs, state, jnp.asarray(x[f"{name}_index"]), negatives)
        found |= {f"{name}_loss": value, f"grad_{name}_student": gradient}
        found |= {f"{name}_memory_v1": state.student, f"{name}_memory_v2": state.teacher}
        found |= {f"{name}_Z_v1": jnp.exp(state.log_z[0]), f"{name}_Z_v2": jnp.exp(state.log_z[1])}
        found |= name_gradients(gradients, [], f"gradw_{name}_")
    return keep(golden, found)


def check_reviewkd(golden: Golden) -> dict:
    x, kwargs = golden.x, golden.kwargs
    depth = sum(re.fullmatch(r"student_\d+", key) is not None for key in x)
    student, teacher = (
        [nhwc(x[f"{side}_{k}"]) for k in range(depth)] + [jnp.asarray(x[f"{side}_pooled"])[:, None, None, :]]
        for side in ("student", "teacher")
    )
    shapes = [t.shape[1:] for t in teacher]
    module = features.Review(kwargs.get("max_mid_channel", 512), dtype=DTYPE)
    weights = variables(module, golden.w, features.REVIEW_NAMES, student, shapes)
    scale = kwargs.get("weight", 1.0) * warmup(float(x.get("epoch", jnp.inf)), kwargs.get("warmup_epochs", 0))

    def loss(params, student):
        out, _ = module.apply({**weights, "params": params}, student, shapes, mutable=["batch_stats"])
        return scale * jnp.mean(features.review(out, teacher))

    value, (gradients, maps) = jax.jit(jax.value_and_grad(loss, (0, 1)))(weights["params"], student)
    found = {"loss": value, "grad_student_pooled": maps[-1][:, 0, 0]}
    found |= {f"grad_student_{k}": nchw(maps[k]) for k in range(depth)}
    return keep(golden, found | name_gradients(gradients, features.REVIEW_NAMES, "gradw_"))


def check_fitnet(golden: Golden) -> dict:
    found = {}
    for case in sorted(key.removesuffix("_student") for key in golden.x if key.endswith("_student")):
        weights = {k.removeprefix(f"{case}."): v for k, v in golden.w.items() if k.startswith(f"{case}.")}
        student, teacher = nhwc(golden.x[f"{case}_student"]), nhwc(golden.x[f"{case}_teacher"])
        module = features.ConvReg(teacher.shape[-1], teacher.shape[1:3], dtype=DTYPE)
        weights = variables(module, weights, [], student)

        def loss(x, module=module, weights=weights, teacher=teacher):
            out, new = module.apply(weights, x, mutable=["batch_stats"])
            return jnp.mean(features.mse(out, teacher)), (out, new["batch_stats"])

        (value, (out, stats)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
        found |= {f"{case}_loss": value, f"{case}_out": nchw(out), f"grad_{case}_student": nchw(gradient)}
        found |= {f"{case}_new_running_{name}": stats["bn"][name] for name in ("mean", "var")}
    return keep(golden, found)


CHECKS = {
    "cifar_resnet": check_cifar_resnet,
    "kd": check_kd,
    "dkd": check_dkd,
    "dist": check_dist,
    "cc": check_cc,
    "rkd": check_rkd,
    "crd": check_crd,
    "reviewkd": check_reviewkd,
    "fitnet": check_fitnet,
    **kdlosses_logits.CHECKS,
    **kdlosses_features.CHECKS,
}
