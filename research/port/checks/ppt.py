"""Golden checks of PPT: a whole small network, with what it decided for every image at every reducing block."""

import jax
import numpy as np

from research.backbones import vit
from research.port.checks import common
from research.port.checks.transformers import arguments
from research.port.verify import Golden
from research.tokens import moves, ppt
from research.tokens.tome import schedule

# Arguments of timm's constructor that its evaluation does not depend on, or that are none where these methods are.
NEUTRAL = ("attn_drop_rate", "qk_scale", "representation_size", "embed_layer")


def asked(r, depth: int) -> tuple[int, ...]:
    """One number a block from an official `r`: an integer, a list, or an (integer, slope) that JSON made a list."""
    if isinstance(r, list) and len(r) == 2 and (isinstance(r[1], float) or r[1] < 0):
        return schedule(depth, r[0], r[1])
    return schedule(depth, r)


def within(counts, tokens: int, protected: int) -> tuple[int, ...]:
    """`counts` cut to the tokens there are, where the official code takes half of them and says nothing."""
    cut = []
    for r in counts:
        cut.append(min(r, max(tokens - protected, 0)))
        tokens -= min(r, (tokens - protected) // 2)
    return tuple(cut)


def tiny_vit(golden: Golden) -> dict:
    """Logits of all settings the golden names; of its own one also everything about the reducing blocks."""
    options, blocks = arguments(golden, *NEUTRAL), golden.meta["pp_loc_list"]
    image = common.nhwc(golden.x["image"])
    tokens = golden.w["pos_embed"].shape[1]
    r = asked(golden.meta["r"], options["depth"])[: len(blocks)]
    setting = {"threshold": golden.meta["threshold"], "prop_attn": golden.meta.get("prop_attn", True)}

    def run(r, **changes):
        prefix = 1 if changes.get("policy") == "prune" else 1 + int(options.get("distilled", False))
        reduce = ppt.reduction(within(r, tokens, prefix), blocks, **{**setting, **changes})
        model = vit.build(**options, reduce=reduce)
        return jax.jit(model.apply)(common.variables(golden, vit, model), image)

    logits, endpoints = run(r)
    outputs = {"logits": logits, "source": moves.source(endpoints["origin"], endpoints["tokens"].shape[1])}
    for block in blocks:
        found = _block(endpoints, block)
        outputs |= {f"block{block}/{name}": value for name, value in found.items()}
    settings = {"all_prune": {"policy": "prune"}, "all_pool": {"policy": "pool"}}
    for name, changes in settings.items():
        if any(key.endswith(name) for key in golden.y):
            logits, endpoints = run(r, **changes)
            outputs |= {f"logits_{name}": logits, f"size_{name}": endpoints["size"][..., None]}
    if "logits_r0" in golden.y:
        outputs["logits_r0"] = run((0,) * len(blocks))[0]
    return outputs


def _block(endpoints: dict, block: int) -> dict:
    """What the golden tells of one block. Matchings are numbered within the even and the odd tokens."""
    name = f"block{block + 1:02d}"
    found = {key.removeprefix(f"{name}_"): np.asarray(v) for key, v in endpoints.items() if key.startswith(f"{name}_")}
    pruned, step = found["pruned"], moves.Moves(*(found[key] for key in moves.Moves._fields))
    unmerged, source, target = matched(moves.Moves(*(part[~pruned] for part in step)))
    return {
        "scores": found["scores"],
        "variance": found["variance"],
        "policy": pruned,
        "tokens_out": endpoints[name],
        "size": found["size"][..., None],
        "prune_keep_idx": step.keep[pruned],
        "pool_unm_idx": unmerged,
        "pool_src_idx": source,
        "pool_dst_idx": target,
    }


def matched(step: moves.Moves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The official indices (unmerged, source, destination) of a bipartite matching: within even and odd positions."""
    keep, drop, into = (np.asarray(part) for part in step)
    left, odd = keep.shape[1], (keep.shape[1] + drop.shape[1]) // 2
    unmerged = keep[keep % 2 == 0].reshape(len(keep), left - odd)  # also where there is no image
    return unmerged // 2, drop // 2, np.take_along_axis(keep, into, 1) // 2


CHECKS = {"tiny_vit": tiny_vit}
