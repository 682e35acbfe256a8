"""Golden checks of post-training quantisation: rounding to nearest, GPTQ, learned rounding."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from research.port.checks import cbq_windows
from research.port.verify import Golden
from research.quantize import fake, grids, reconstruction, rounding, smoothquant
from research.quantize.gptq import add, gptq, second_moment
from research.quantize.grids import Form, Grid
from research.quantize.quantized import dequantize, quantize


def rtn_quant(golden: Golden) -> dict[str, np.ndarray]:
    """Every setting that a key names: method, granularity, bits, and what else; weights are (out, in)."""
    x, outputs = {name: jnp.asarray(value) for name, value in golden.x.items()}, {}
    for name in sorted({key.partition("/")[0] for key in golden.y} - {"smoothquant", "omni_lwc"}):
        outputs |= _setting(name, x, golden)
    if any(key.startswith("smoothquant/") for key in golden.y):
        outputs |= _smoothed(x, golden.meta.get("alpha", 0.5))
    return outputs


def _form(name: str, golden: Golden) -> Form:
    """The form of a setting such as `gptq_perchannel_b4_asym_mse`, `awq_group8_b4` or `smooth_a_pertoken_absmax_b8`."""
    method, words = name.split("_")[0], name.split("_")[1:]
    group = re.search(r"_group(\d*)", name)
    symmetric, search = "sym" in words, "mse" in words
    rules = {
        "gptq": f"gptq{'_symmetric' * symmetric}{'_mse' * search}",
        "omni": f"omniquant{'_symmetric' * symmetric}",
        "awq": "awq",
        "smooth": "absmax",
    }
    return Form(
        bits=int(re.search(r"_b(\d+)", name)[1]),
        axis=-1,
        group=int(group[1] or golden.meta["group"]) if group else None,
        per_tensor="pertensor" in words,
        rule=rules[method],
    )


def _setting(name: str, x: dict, golden: Golden) -> dict:
    form = _form(name, golden)
    array = x["act" if {"a", "act", "pertoken"} & set(name.split("_")) else "w"]
    if name.startswith("omni_lwc"):
        return _clipped(name, x, form)
    q = quantize(array, form)
    if name.startswith("smooth"):
        return {name: dequantize(q)}
    found = {"dq": dequantize(q), "int": q.codes.astype(jnp.int32), "scale": q.scales, "zero": q.zeros}
    for part in ("scale", "zero"):  # the official arrays have the number of scales that there are, in all shapes
        expected = golden.y.get(f"{name}/{part}")
        if expected is not None:
            size = expected.size if form.per_tensor else found[part].size
            found[part] = jnp.broadcast_to(found[part].ravel(), (size,)).reshape(expected.shape)
    return {f"{name}/{part}": value for part, value in found.items() if f"{name}/{part}" in golden.y}


def _clipped(name: str, x: dict, form: Form) -> dict:
    """Learnable clipping, and its gradients for a cotangent; factors lie (rows and groups, 1)."""
    rows = x["w"].shape[0]
    factors = tuple(x[f"lwc_{part}"].reshape(rows, -1) for part in ("up", "low"))
    dq, back = jax.vjp(lambda up, low: fake.learnable_clip(x["w"], up, low, form), *factors)
    found = {f"{name}/dq": dq}
    for part, gradient in zip(("up", "low"), back(x["lwc_cotangent"]), strict=True):
        found[f"omni_lwc/grad_{part}"] = gradient.reshape(x[f"lwc_{part}"].shape)
    return found


def _smoothed(x: dict, alpha: float) -> dict:
    kernels = [x[name].T for name in ("w", "fc2_w") if name in x]
    factors = smoothquant.factors(x["act_scales"], kernels, alpha)
    norm, kernels = smoothquant.fold((x["ln_w"], x["ln_b"]), kernels, factors)
    names = ("ln_w", "ln_b", "fc_w", "fc2_w")
    return {f"smoothquant/{n}": v for n, v in zip(names, [*norm, *(w.T for w in kernels)], strict=False)}


def lora_rounding(golden: Golden) -> dict[str, np.ndarray]:
    """LoRA-Rounding from both starts with gradients of factors and scales, its regulariser, and the measure E."""
    x, meta = {name: jnp.asarray(value) for name, value in golden.x.items()}, golden.meta
    bits, ends = meta["bits"], {key: meta.get(key, d) for key, d in (("zeta", 1.1), ("gamma", -0.1))}
    w, scales = x["w"], x["scale"].reshape(-1, 1)
    zeros = jnp.round(grids.divide(-jnp.minimum(jnp.min(w, axis=1, keepdims=True), 0), scales))
    fractions = rounding.start(grids.divide(w, scales), **ends)
    outputs = {"zero": zeros[:, 0], "V0_frac": fractions}
    for name, v0 in (("v0_zero", jnp.zeros_like(w)), ("v0_frac", fractions)):

        def added(a1, a2, v0=v0):
            return rounding.share(v0 + a1 @ a2, **ends)

        def dequantized(a1, a2, scales, added=added):
            return rounding.soft(w, Grid(scales, zeros), added(a1, a2), bits, through=True)

        dq, back = jax.vjp(dequantized, x["A1"], x["A2"], scales)
        slopes = back(x["cotangent"])
        outputs |= {f"{name}/grad_{part}": slope for part, slope in zip(("A1", "A2"), slopes, strict=False)}
        outputs |= {
            f"{name}/grad_scale": slopes[2][:, 0],
            f"{name}/delta": added(x["A1"], x["A2"]),
            f"{name}/soft_dq": dq,
            f"{name}/hard_dq": rounding.hard(w, Grid(scales, zeros), v0 + x["A1"] @ x["A2"], bits),
        }
        for beta in {re.search(r"com_loss_b([\d.]+)", key)[1] for key in golden.y if "com_loss_b" in key}:
            loss = lambda a1, b=float(beta), added=added: rounding.undecided(added(a1, x["A2"]), b)
            value, slope = jax.value_and_grad(loss)(x["A1"])
            outputs |= {f"{name}/com_loss_b{beta}": value, f"{name}/com_loss_b{beta}_grad_A1": slope}
    value, slope = jax.value_and_grad(reconstruction.distance, argnums=1)(x["h1"], x["h2"])
    parts = {"l2_mean": reconstruction.squares, "kl_mean": reconstruction.divergence}
    outputs |= {f"E/{name}": measure(x["h1"], x["h2"]) for name, measure in parts.items()}
    return outputs | {"E/value": value, "E/grad_h2": slope}


def calibrated(golden: Golden) -> dict[str, np.ndarray]:
    """GPTQ in every setting of `configs`, whose fields make the names of outputs; weights are (out, in).

    A calibration set without a leading axis of sequences counts as one sample for each part in which it was given.
    """
    w, x, meta = jnp.asarray(golden.x["w"]).T, jnp.asarray(golden.x["calib"]), golden.meta
    stated = re.search(r"(\d+) chunks", meta.get("notes", ""))
    moment = second_moment(len(w), w.dtype)
    for part in jnp.array_split(x, meta.get("chunks", int(stated[1]) if stated else 1)):
        moment = add(moment, part)
    outputs = {"hessian": moment.hessian}
    for config in meta["configs"]:
        name = "gptq_" + "_".join(f"{field}{config[field]}" for field in sorted(config))
        q, error, _ = _by_gptq(w, moment, {"percdamp": meta.get("percdamp", 0.01)} | config)
        outputs |= {f"{name}/dq": dequantize(q).T, f"{name}/proxy_loss": error}
    return outputs


def _by_gptq(w: jax.Array, moment, config: dict):
    fields = {SAME.get(field, field): value for field, value in config.items()}
    rule = f"gptq{'_symmetric' * fields.pop('sym', False)}{'_mse' * fields.pop('mse', False)}"
    group = fields.pop("group", None)
    form = Form(
        bits=fields.pop("bits"),
        group=group if group and group > 0 else None,
        per_tensor=not fields.pop("perchannel", True),
        rule=rule,
        pad=True,
    )
    return gptq(w, moment, form, **fields)


# Names of the official arguments, and others that they go by.
SAME = {
    "wbits": "bits",
    "groupsize": "group",
    "group_size": "group",
    "blocksize": "block",
    "percdamp": "damping",
    "actorder": "act_order",
    "desc_act": "act_order",
    "static": "static_groups",
}


def adaround(golden: Golden) -> dict[str, np.ndarray]:
    """AdaRound as BRECQ has it: grid, start, soft and hard rounding with gradients, regulariser and its schedule.

    Values and gradients are at the alpha that the file gives. That is a start which was then disturbed in place: files
    whose `alpha_init` is that same array do not hold the start, and `lora_rounding` has to say that ours is right.
    """
    x, meta = {name: jnp.asarray(value) for name, value in golden.x.items()}, golden.meta
    bits, ends = meta["n_bits"], {key: meta[key] for key in ("zeta", "gamma") if key in meta}
    w, alpha = x["w"], x["alpha"]
    grid = grids.fit(w, Form(bits, axis=-1))
    added = lambda alpha: rounding.share(alpha, **ends)
    dequantized, back = jax.vjp(lambda alpha: rounding.soft(w, grid, added(alpha), bits), alpha)
    start = rounding.start(grids.divide(w, grid.scales), **ends)
    overwritten = np.array_equal(golden.y.get("alpha_init", start), alpha)
    outputs = {
        "delta": grid.scales[:, 0],
        "zero_point": grid.zeros[:, 0],
        "alpha_init": alpha if overwritten else start,
        "soft_targets": added(alpha),
        "soft_dq": dequantized,
        "soft_grad_alpha": back(x["cotangent"])[0],
        "hard_dq": rounding.hard(w, grid, alpha, bits),
    }
    for beta in meta["betas"]:
        value, slope = jax.value_and_grad(lambda alpha, b=beta: rounding.undecided(added(alpha), b))(alpha)
        outputs |= {f"round_loss_b{beta}/value": value, f"round_loss_b{beta}/grad_alpha": slope}
    decay = meta["temp_decay"]
    steps = decay["t_max"], decay["rel_start_decay"], decay["start_b"], decay["end_b"]
    return outputs | {"temp_decay": rounding.temperature(jnp.asarray(decay["steps"]), *steps)}


CHECKS = {"rtn_quant": rtn_quant, "gptq": calibrated, "adaround": adaround, "lora_rounding": lora_rounding}
CHECKS |= cbq_windows.CHECKS
