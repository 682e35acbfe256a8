"""Golden checks of CBQ's own steps: pre-processing of outliers, the loss of a window of blocks."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from research.port.verify import Golden
from research.quantize import cfp as preprocessing
from research.quantize import window
from research.quantize.grids import Form
from research.quantize.window import Fixed, Learned, Scheme

cut = jax.jit(preprocessing.cut, static_argnames=("rule", "fewest"))
factors = jax.jit(preprocessing.factors, static_argnames="rule")


def cfp(golden: Golden) -> dict[str, np.ndarray]:
    """Outliers of weights and activations, by the public code with the settings that keys name, and by the paper."""
    low, high = (jnp.asarray(golden.x[f"per_channel_{end}"]) for end in ("min", "max"))
    official, outputs = _official(golden.meta), {"official/scale": None}
    outputs["official/scale"] = factors(low, high, official)
    for key in golden.y:
        if found := re.fullmatch(r"official/scale_alpha([\d.]+)_rate([\d.]+)", key):
            rule = dataclasses.replace(official, reach=float(found[1]), exponent=float(found[2]))
            outputs[key] = factors(low, high, rule)
    for side, values, sign in (("pos", high, 1), ("neg", -low, -1)):
        found = cut(values, official, fewest=sign > 0)
        outputs |= {
            f"official/coarse_threshold_{side}": sign * found.coarse,
            f"official/otsu_{side}_threshold": sign * found.threshold,
            f"official/otsu_{side}_count": found.count,
            f"official/otsu_{side}_outliers": np.sort(sign * _largest(values, found.count))[::-1],
        }
    return outputs | _paper(golden, low, high)


def _largest(values, count) -> np.ndarray:
    """As many of the largest values, ascending."""
    return np.sort(np.ravel(values))[values.size - int(count) :]


def _official(meta: dict) -> preprocessing.Criterion:
    names = {"reach": "alpha", "exponent": "smooth_rate"}
    stated = {field: float(meta[name]) for field, name in names.items() if name in meta}
    return dataclasses.replace(preprocessing.OFFICIAL, **stated)


def _paper(golden: Golden, low, high) -> dict:
    names = {"reach": "lambda1", "spread": "lambda2"}
    stated = {field: float(golden.meta[name]) for field, name in names.items() if name in golden.meta}
    rule = dataclasses.replace(preprocessing.PAPER, **stated)
    w = jnp.asarray(golden.x["w"])
    magnitudes, largest = jnp.abs(w).ravel(), jnp.maximum(jnp.abs(low), jnp.abs(high))
    weights, activations = cut(magnitudes, rule), cut(largest, rule)
    first = {"weight": _largest(magnitudes, weights.count), "act": _largest(largest, activations.count)}
    return {
        "ref/weight_coarse_T": weights.coarse,
        "ref/weight_candidates": np.sort(magnitudes[magnitudes > weights.coarse]),
        "ref/weight_truncated": preprocessing.truncate(w, rule),
        "ref/weight_limit": weights.limit,
        "ref/act_scale": factors(low, high, rule),
        **{f"ref/{name}_first_outlier": values[0] for name, values in first.items() if len(values)},
    }


LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def cbd_window(golden: Golden) -> dict[str, np.ndarray]:
    """Loss, its parts and gradients of every window, behind blocks that are quantised with the parameters given."""
    meta = golden.meta
    each = [_block(golden.w, f"blocks.{index}.", meta) for index in range(meta["blocks"])]
    learned, fixed, schemes = ([part[i] for part in each] for i in range(3))
    weights = [rest.weights for rest in fixed]
    blocks = [functools.partial(_layer, heads=meta["heads"])] * len(each)
    hidden, outputs = jnp.asarray(golden.x["hidden"]), {}
    for index, bounds in enumerate(_windows(meta)):
        before, inside = slice(0, min(bounds)), slice(min(bounds), max(bounds) + 1)
        exact = window.run(blocks[before], weights[before], hidden)
        rough = window.run_quantized(blocks[before], learned[before], fixed[before], schemes[before], hidden)
        wanted = window.targets(blocks[inside], weights[inside], exact, rough)
        loss = functools.partial(
            window.window_loss, blocks=blocks[inside], schemes=schemes[inside], weight=meta["com_weight"]
        )
        slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (total, parts), slopes = slope(learned[inside], fixed[inside], rough, wanted, meta["beta"])
        found = {**parts, "total": total, "target_fp": wanted[0], "target_homologous": wanted[1]}
        found["out_q"] = window.run_quantized(blocks[inside], learned[inside], fixed[inside], schemes[inside], rough)
        for place, slopes_of_block in enumerate(slopes, start=min(bounds)):
            found |= {f"grad/{place}.{leaf}": value for leaf, value in _leaves(slopes_of_block).items()}
        outputs |= {f"win{index}/{name}": value for name, value in found.items()}
    return outputs


def _windows(meta: dict) -> list:
    if "windows" in meta:
        return meta["windows"]
    size, stride = meta["window"], meta["window"] - meta["overlap"]
    return [range(first, first + size) for first in range(0, meta["blocks"] - size + 1, stride)]


def _block(w: dict, prefix: str, meta: dict) -> tuple[Learned, Fixed, dict[str, Scheme]]:
    own = {key.removeprefix(prefix): jnp.asarray(value) for key, value in w.items() if key.startswith(prefix)}
    names = [name for name in LINEARS if f"{name}.w_scale" in own]
    pick = lambda leaf: {name: own[f"{name}.{leaf}"] for name in names if f"{name}.{leaf}" in own}
    a1, a2 = pick("A1"), pick("A2")
    starts = {name: jnp.zeros_like(own[name]) for name in names} | pick("V0")
    learned = Learned(pick("w_scale"), pick("act_scale"), {name: (a1[name], a2[name]) for name in names})
    fixed = Fixed({key: value for key, value in own.items() if "." not in key}, pick("zero"), starts, {})
    group = lambda name: own[name].shape[1] // own[f"{name}.w_scale"].shape[1]
    bits = lambda name: meta["a_bits"] if name in learned.inputs else None
    forms = {name: Form(meta["w_bits"], axis=-1, group=group(name)) for name in names}
    return learned, fixed, {name: Scheme(form, bits(name)) for name, form in forms.items()}


def _leaves(slopes: Learned) -> dict:
    found = {f"{name}.w_scale": value for name, value in slopes.steps.items()}
    found |= {f"{name}.act_scale": value for name, value in slopes.inputs.items()}
    for name, pair in slopes.factors.items():
        found |= {f"{name}.A{number}": value for number, value in enumerate(pair, start=1)}
    return found


def _layer(weights, x, enter, heads: int):
    """LLaMA's block without rotation, weights (out, in)."""
    dense = lambda name, x: enter(name, x) @ weights[name].T
    y = _rms(x, weights["ln1"])
    q, k, v = (dense(name, y).reshape(*y.shape[:2], heads, -1) for name in "qkv")
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    x = x + dense("o", jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(*x.shape[:2], -1))
    y = _rms(x, weights["ln2"])
    return x + dense("down", jax.nn.silu(dense("gate", y)) * dense("up", y))


def _rms(x, scale, epsilon=1e-6):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale[None, None]


CHECKS = {"cfp": cfp, "cbd_window": cbd_window}
