"""Golden checks of the distillation losses that see logits, tokens of language models and stored labels."""

import re

import jax
import jax.numpy as jnp
import optax

from research.distill import dot, ensembles, label_aware, multilevel, sequence, stored_labels
from research.distill import standardized as ls
from research.distill import temperature as ctkd
from research.distill.ground_truth import cross_entropy
from research.port.checks.kdlosses_common import DTYPE, keep, name_gradients, part, value_and_gradient, variables
from research.port.verify import Golden


def _inputs(golden: Golden) -> tuple:
    x = golden.x
    return x["logits_student"], jnp.asarray(x["logits_teacher"]), jnp.asarray(x["target"]) if "target" in x else None


def check_lskd(golden: Golden) -> dict:
    (student, teacher, labels), kwargs = _inputs(golden), golden.kwargs
    options = {"alpha": kwargs["dkd_alpha"], "beta": kwargs["dkd_beta"]}
    kd = lambda s: jnp.mean(ls.lskd(s, teacher, temperature=kwargs["T"]))
    dkd = lambda s: jnp.mean(ls.lskd_dkd(s, teacher, labels, temperature=kwargs["T"], **options))
    found = {"standardised_student": ls.standardize(jnp.asarray(student))}
    for name, loss in {"kd": kd, "dkd": dkd}.items():
        found[f"loss_{name}"], found[f"grad_{name}"] = value_and_gradient(loss, student)
    return keep(golden, found)


def check_nkd(golden: Golden) -> dict:
    student, teacher, labels = _inputs(golden)
    options = {"temperature": golden.kwargs["temp"], "gamma": golden.kwargs["gamma"]}
    loss = lambda y: lambda s: jnp.mean(label_aware.nkd(s, teacher, jnp.asarray(y), **options))
    found = dict(zip(("loss", "grad_logits_student"), value_and_gradient(loss(labels), student), strict=True))
    if "soft_target" in golden.x:
        soft = value_and_gradient(loss(golden.x["soft_target"]), student)
        found["loss_soft_target"], found["grad_soft_target"] = soft
    return keep(golden, found)


def check_wsld(golden: Golden) -> dict:
    student, teacher, labels = _inputs(golden)
    options = {"temperature": golden.kwargs["temp"], "alpha": golden.kwargs["alpha"]}
    loss = lambda s: jnp.mean(label_aware.wsld(s, teacher, labels, **options))
    found = dict(zip(("loss", "grad_logits_student"), value_and_gradient(loss, student), strict=True))
    return keep(golden, found | {"focal_weight": label_aware.wsld_weight(jnp.asarray(student), teacher, labels)})


def check_uskd(golden: Golden) -> dict:
    x, labels = golden.x, jnp.asarray(golden.x["target"])
    options = {name: golden.kwargs[name] for name in ("alpha", "beta", "mu")}
    kernel, bias = jnp.asarray(golden.w["fc.weight"]), jnp.asarray(golden.w["fc.bias"])

    def loss(pair):
        return label_aware.uskd(pair[0], pair[1] @ kernel.T + bias, labels, **options)

    pair = jnp.asarray(x["logits"]), jnp.asarray(x["mid_feature"])
    value, (found, middle) = jax.jit(jax.value_and_grad(loss))(pair)
    return keep(golden, {"loss": value, "grad_logits": found, "grad_mid_feature": middle})


def check_ctkd(golden: Golden) -> dict:
    (student, teacher, _), kwargs = _inputs(golden), golden.kwargs
    span = {"low": kwargs["t_start"], "span": kwargs["t_end"]}
    strength = jnp.asarray(golden.x["lambda"])

    def loss(theta, student):
        return jnp.mean(ctkd.ctkd(student, teacher, theta[0], strength=strength, **span))

    theta = jnp.asarray(golden.w["global_T"])
    value, (of_theta, of_student) = jax.jit(jax.value_and_grad(loss, (0, 1)))(theta, jnp.asarray(student))
    found = {"loss": value, "grad_global_T": of_theta, "grad_logits_student": of_student}
    found["temperature"] = ctkd.temperature(theta, **span)
    for key in golden.y:
        if schedule := re.fullmatch(r"lambda_(\w+)_(-?[\d.]+)_to_(-?[\d.]+)_in_(\d+)", key):
            shape, start, end, epochs = schedule.groups()
            options = {"epochs": int(epochs), "start": float(start), "end": float(end), "shape": shape}
            found[key] = ctkd.strength(jnp.asarray(golden.x["epochs"]), **options)
    return keep(golden, found)


def check_mlld(golden: Golden) -> dict:
    x, kwargs, labels = golden.x, golden.kwargs, jnp.asarray(golden.x["target"])
    views = lambda side: multilevel.Views(*(jnp.asarray(x[f"{side}_{view}"]) for view in multilevel.Views._fields))
    options = {"temperature": kwargs["T"], "ce_weight": kwargs["ce_weight"], "kd_weight": kwargs["kd_weight"]}
    found = {}
    for suffix, standardized in (("", False), ("_ls", True)):

        def loss(student, standardized=standardized):
            parts = multilevel.mlld(student, views("teacher"), labels, standardized=standardized, **options)
            return sum(parts), parts

        (value, parts), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(views("student"))
        found[f"loss{suffix}"] = value
        for name, term in zip(("ce", "kd", "cc", "bc"), parts, strict=True):
            found[f"loss_{name}{suffix}"] = term
        for name in gradient._fields:
            found[f"grad_student_{name}{suffix}"] = getattr(gradient, name)
    return keep(golden, found)


def check_gkd_jsd(golden: Golden) -> dict:
    (student, teacher, _), labels = _inputs(golden), jnp.asarray(golden.x["labels"])
    found: dict[str, list] = {}
    for beta in golden.x["betas"]:
        # Betas were stored in float32: 0 and 1 are exact, the others were rounded on the way.
        options = {"beta": round(float(beta), 6), "temperature": golden.kwargs["temperature"]}
        tokens = lambda s, options=options: sequence.jsd(s, teacher, **options)
        value, gradient = value_and_gradient(lambda s, f=tokens: sequence.token_mean(f(s), labels), student)
        values = tokens(jnp.asarray(student))
        row = {"loss": value, "grad_logits_student": gradient, "loss_no_labels": sequence.token_mean(values)}
        for key in golden.y:
            if items := re.fullmatch(r"loss_sum_over_(\d+)_items", key):
                row[key] = sequence.token_mean(values, labels, count=int(items[1]))
        for key, entry in row.items():
            found.setdefault(key, []).append(entry)
    return keep(golden, {key: jnp.stack(column) for key, column in found.items()})


def check_llm_divergences(golden: Golden) -> dict:
    (student, teacher, _), labels = _inputs(golden), jnp.asarray(golden.x["labels"])
    skew, mix = golden.kwargs["lam_skew"], golden.kwargs["lam_sym_js"]
    losses = {
        "forward_kl": lambda s: sequence.forward_kl(s, teacher),
        "reverse_kl": lambda s: sequence.reverse_kl(s, teacher),
        "symmetric_kl": lambda s: sequence.symmetric_kl(s, teacher, lam=mix),
        "js_distance": lambda s: sequence.js(s, teacher, lam=mix),
        "tv_distance": lambda s: sequence.total_variation(s, teacher),
        "skewed_forward_kl": lambda s: sequence.skewed_kl(s, teacher, lam=skew),
        "skewed_reverse_kl": lambda s: sequence.skewed_reverse_kl(s, teacher, lam=skew),
    }
    found = {}
    for name, loss in losses.items():
        mean = lambda s, loss=loss: sequence.token_mean(loss(s), labels)
        found[f"loss_{name}"], found[f"grad_{name}"] = value_and_gradient(mean, student)
    return keep(golden, found)


def check_funmatch(golden: Golden) -> dict:
    x, kwargs = golden.x, golden.kwargs
    count = sum(re.fullmatch(r"logits_teacher_\d+", name) is not None for name in x)
    teachers = jnp.stack([jnp.asarray(x[f"logits_teacher_{k + 1}"]) for k in range(count)])
    student, found = jnp.asarray(x["logits_student"]), {}
    for kind in ensembles.DISTANCES:
        options = {"kind": kind, "temperature": kwargs["t"], "smoothing": kwargs["ls_hard"]}
        # Distances by example are stated for the first teacher.
        found[f"per_example_{kind}"] = ensembles.distance(student, teachers[0], **options)
        loss = lambda s, options=options: jnp.mean(ensembles.funmatch(s, teachers, **options))
        found[f"loss_{kind}"], found[f"grad_{kind}"] = value_and_gradient(loss, student)
    for key in golden.y:
        if top := re.fullmatch(r"agree_top(\d+)", key):
            found[key] = ensembles.agreement(student, teachers[0], top=int(top[1]))
    if "image" in x:
        amount = float(x["mixup_a"])
        found["image_mixed"] = ensembles.consistent_mixup(jnp.asarray(x["image"]), amount)
        found["labels_mixed"] = ensembles.consistent_mixup(jnp.asarray(x["labels"]), amount)
    return keep(golden, found)


def check_mealv2(golden: Golden) -> dict:
    x = golden.x
    count = sum(re.fullmatch(r"logits_teacher_\d+", name) is not None for name in x)
    teachers = jnp.stack([jnp.asarray(x[f"logits_teacher_{k}"]) for k in range(count)])
    student = jnp.asarray(x["logits_student"])
    module = ensembles.Discriminator(golden.kwargs["K"], dtype=DTYPE)
    params = variables(module, part(golden.w, "discriminator"), [], student)["params"]

    def judged(params, student):
        judge = lambda z: module.apply({"params": params}, z)
        return jnp.mean(ensembles.discriminate(judge(student), judge(jnp.mean(teachers, axis=0))))

    def total(params, student):
        parts = jnp.mean(ensembles.meal(student, teachers)), judged(params, student)
        return sum(parts), parts

    (value, parts), (gradients, gradient) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(params, student)
    found = {"loss": value, "loss_ce": parts[0], "loss_discriminator": parts[1], "grad_logits_student": gradient}
    found["soft_label"] = ensembles.soft_label(teachers)
    found["grad_disc_only_logits_student"] = jax.grad(judged, 1)(params, student)
    for name, array in name_gradients(gradients, [], "gradw_discriminator.").items():
        found[name] = array[..., None, None] if name.endswith("weight") else array
    return keep(golden, found)


def check_dataset_reinforcement(golden: Golden) -> dict:
    x, kwargs, found = golden.x, golden.kwargs, {}
    index, value = stored_labels.sparsify(jnp.asarray(x["teacher_prob"]), kwargs["topk"])
    found["topk_index_sorted_by_class"], found["topk_prob"] = index, value
    for form in ("smooth", "zeros"):
        target = stored_labels.densify(index, value, kwargs["num_classes"], form=form)
        # The divergence is the cross-entropy less the label's entropy.
        entropy = jnp.mean(jnp.sum(jax.scipy.special.entr(target), axis=-1))
        loss = lambda s, target=target, entropy=entropy: jnp.mean(cross_entropy(s, target)) - entropy
        found[f"dense_{form}"] = target
        found[f"loss_{form}"], found[f"grad_{form}"] = value_and_gradient(loss, x["logits_student"])
    classes = kwargs["fkd_classes"]
    for key in golden.y:
        if key == "fkd_marginal_renorm" or key.startswith("fkd_marginal_smoothing"):
            classes_kept, kept = x["fkd_label"][:, 0].astype(int), jnp.asarray(x["fkd_label"][:, 1])
            form = "renormalize" if key.endswith("renorm") else "smooth"
            found[key] = stored_labels.densify(jnp.asarray(classes_kept), kept, classes, form=form)
        elif key == "fkd_smoothing":
            label = x["fkd_label_smoothing"]
            best = jnp.asarray(label[:, :1].astype(int))
            found[key] = stored_labels.densify(best, jnp.asarray(label[:, 1:]), classes)
    return keep(golden, found)


def check_dot_optimizer(golden: Golden) -> dict:
    x, kwargs = golden.x, golden.kwargs
    options = {"momentum": kwargs["momentum"], "delta": kwargs["delta"], "weight_decay": kwargs["weight_decay"]}
    optimizer = dot.dot(kwargs["lr"], **options)
    names = sorted(name.removesuffix("0") for name in x if re.fullmatch(r"[a-z]+0", name))
    params = {name: jnp.asarray(x[f"{name}0"]) for name in names}
    state, found, step = optimizer.init(params), {}, 0
    while any(f"{kind}_grad_{name}_{step}" in x for kind in ("task", "kd") for name in names):
        pair = ({n: x.get(f"{kind}_grad_{n}_{step}") for n in names} for kind in ("task", "kd"))
        updates, state = optimizer.update(dot.Gradients(*pair), state, params)
        params = optax.apply_updates(params, updates)
        found |= {f"{name}_{step}": params[name] for name in names}
        step += 1
    return keep(golden, found)


CHECKS = {
    "lskd": check_lskd,
    "nkd": check_nkd,
    "wsld": check_wsld,
    "uskd": check_uskd,
    "ctkd": check_ctkd,
    "mlld": check_mlld,
    "gkd_jsd": check_gkd_jsd,
    "llm_divergences": check_llm_divergences,
    "funmatch": check_funmatch,
    "mealv2": check_mealv2,
    "dataset_reinforcement": check_dataset_reinforcement,
    "dot_optimizer": check_dot_optimizer,
}
