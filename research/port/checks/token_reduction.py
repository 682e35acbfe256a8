"""Golden checks of the methods beside PPT: ToMe's matchings and network, EViT, and those of `token_policies`."""

import math
import re

import jax
import jax.numpy as jnp

from research.backbones import vit
from research.port import resample
from research.port.checks import common, token_policies
from research.port.checks.ppt import NEUTRAL, asked, matched, within
from research.port.checks.transformers import arguments
from research.port.verify import Golden
from research.tokens import evit, matching, moves, tome


def tome_match(golden: Golden) -> dict:
    """A matching of given tokens, all that is computed with it, and the matching of every k-th."""
    meta, x = golden.meta, jnp.asarray(golden.x["x"])
    metric = jnp.asarray(golden.x["metric"])
    size = jnp.asarray(golden.x["size"])[..., 0] if "size" in golden.x else None
    protected = meta.get("class_token", False), meta.get("distill_token", False)
    step = matching.bipartite(metric, meta["r"], *protected)
    outputs = dict(zip(("unm_idx", "src_idx", "dst_idx"), matched(step), strict=True))
    outputs |= {f"merge_{mode}": moves.join(x, step, mode) for mode in ("sum", "mean", "amax")}
    merged, merged_size = moves.merge(x, step, size)
    alone, alone_size = moves.merge(x, step)
    outputs |= {"wavg_x": merged, "wavg_size": merged_size[..., None]}
    outputs |= {"wavg_x_nosize": alone, "wavg_size_nosize": alone_size[..., None]}
    places = moves.destinations(step)
    outputs |= {"source": moves.source(places, merged.shape[1]), "unmerge": moves.unmerge(merged, places)}
    if "cotangent" in golden.x:
        total = lambda x: jnp.sum(moves.merge(x, step, size)[0] * jnp.asarray(golden.x["cotangent"]))
        outputs["grad_x"] = jax.grad(total)(x)
    if "k" in meta:
        every = matching.kth_bipartite(metric, meta["k"])
        inside = x.shape[1] // max(meta["k"], 1) * max(meta["k"], 1)
        joined = moves.join(x, every)
        outputs |= {"kth_merge_sum": joined, "kth_dst_idx": every.into[:, : inside - joined.shape[1]]}
        places = moves.destinations(every)
        outputs["kth_unmerge"] = moves.unmerge(moves.join(x, every, "mean"), places)[:, :inside]
    return outputs


def _apply(golden: Golden, options: dict, reduce) -> tuple[jax.Array, dict]:
    """(logits, endpoints) of the ViT with the golden's weights; its positions are resized for a larger image."""
    image = common.nhwc(golden.x["image"])
    model = vit.build(**{**options, "img_size": image.shape[1:3], "reduce": reduce})
    patch = options.get("patch_size", 16)
    grid = tuple(side // patch for side in image.shape[1:3])
    positions = golden.w["pos_embed"]
    if positions.shape[1] != model.prefix + math.prod(grid):
        weights = resample.sharp_cubic_weights
        positions = resample.absolute(positions, grid, model.prefix, weights=weights)
    golden.w["pos_embed"] = positions
    return jax.jit(model.apply)(common.variables(golden, vit, model), image)


def tome_vit(golden: Golden) -> dict:
    """A network that merges in every block: logits, tokens, sizes and the source map."""
    options = arguments(golden, "global_pool", *NEUTRAL)
    if "fc_norm.weight" in golden.w:  # MAE's network, which classifies the mean of the patches
        options["global_pool"] = "avg"
    tokens, prefix = golden.w["pos_embed"].shape[1], 1 + int(options.get("distilled", False))
    r = golden.meta.get("r_list") or asked(golden.meta["r"], options.get("depth", 12))
    prop_attn = golden.meta.get("prop_attn", True)
    reduce = tome.reduction(within(r, tokens, prefix), prop_attn=prop_attn)
    logits, endpoints = _apply(golden, options, reduce)
    size = jnp.ones(endpoints["block01"].shape[:2])
    outputs = {"logits": logits, "source": moves.source(endpoints["origin"], endpoints["tokens"].shape[1])}
    for block in range(options.get("depth", 12)):
        name = f"block{block + 1:02d}"
        size = endpoints.get(f"{name}_size", size)
        outputs |= {f"block{block}/tokens_out": endpoints[name], f"block{block}/size": size[..., None]}
    outputs["final_size"] = size[..., None]
    if "logits_r0" in golden.y:
        outputs["logits_r0"] = _apply(golden, options, tome.reduction(0, prop_attn=prop_attn))[0]
    return outputs


def check_evit(golden: Golden) -> dict:
    """A network that drops or fuses patches: what it keeps, and logits at the rates that the outputs' names state."""
    options = arguments(golden, "keep_rate", "fuse_token", *NEUTRAL)
    depth, given = options.get("depth", 12), golden.kwargs.get("keep_rate", [1])
    given = [given] if isinstance(given, int | float) else given
    rates = list(given) * depth if len(given) == 1 else list(given)
    blocks = [block for block, rate in enumerate(rates) if rate < 1]
    fuse = golden.kwargs.get("fuse_token", False)
    reduce = evit.reduction([rates[block] for block in blocks], blocks, fuse)
    logits, endpoints = _apply(golden, options, reduce)
    outputs = {"logits": logits}
    for block in range(depth):
        name = f"block{block + 1:02d}"
        outputs[f"block{block}/tokens_out"] = endpoints[name]
        if f"{name}_scores" in endpoints:
            outputs[f"block{block}/cls_attn"] = endpoints[f"{name}_scores"]
            outputs[f"block{block}/keep_idx"] = endpoints[f"{name}_keep"][:, 1:] - 1
            outputs[f"block{block}/complement_idx"] = endpoints[f"{name}_drop"] - 1
    for key in golden.y:
        if found := re.fullmatch(r"logits_keep_rate_([\d.]+)", key):
            rate = evit.reduction(float(found[1]), blocks, fuse)
            outputs[key] = _apply(golden, options, rate)[0]
    return outputs


CHECKS = {"tome_match": tome_match, "tome_vit": tome_vit, "evit": check_evit, **token_policies.CHECKS}
