"""Golden checks of the token reductions that learn, sample or set aside: DynamicViT, ATS, Evo-ViT."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp

from research.backbones import vit
from research.distill.ground_truth import cross_entropy
from research.layers.token_scores import significance
from research.port.checks import common
from research.port.checks.transformers import arguments
from research.port.names import from_official
from research.port.verify import Golden
from research.tokens import ats, dynamicvit, dynamicvit_losses, evo_vit, policies
from research.tokens.moves import rows

# Arguments that no forward pass here depends on: dropout and stochastic depth are off.
NEUTRAL = ("attn_drop_rate", "distill", "momentum", "qk_scale", "representation_size", "hybrid_backbone")


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded(dynamicvit.DynamicViT):
    """DynamicViT whose stages use recorded noise."""

    recorded: tuple[jax.Array, ...] = ()

    def noise(self, predictor, stage, shape):
        return self.recorded[stage]


def check_dynamicvit(golden: Golden) -> dict:
    """Evaluation and training of a whole network, its loss with gradients, and the masked softmax alone."""
    kwargs = dict(golden.kwargs)
    at, keep = tuple(kwargs.pop("pruning_loc")), tuple(kwargs.pop("token_ratio"))
    noise = tuple(jnp.asarray(golden.x[f"gumbel{stage}"]) for stage in range(len(at)) if f"gumbel{stage}" in golden.x)
    fields = dataclasses.asdict(dynamicvit.reduction(at, keep))
    reduce = Recorded(**fields, recorded=noise)
    kwargs = arguments(dataclasses.replace(golden, meta={"kwargs": kwargs}), *NEUTRAL)
    model = vit.build(**kwargs, reduce=reduce)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), common.nhwc(golden.x["image"]))
    weights = from_official(shapes, golden.w, (*dynamicvit.NAMES, *vit.NAMES["official"]))
    run = jax.jit(model.apply, static_argnames="train")

    logits, seen = run(weights, common.nhwc(golden.x["image"]))
    outputs = {"eval/logits": logits}
    for stage, block in enumerate(at):
        outputs[f"eval/pred{stage}_log_probs"] = seen[f"block{block + 1:02d}_log_probs"]
        outputs[f"eval/pred{stage}_keep_set_sorted"] = jnp.sort(seen[f"block{block + 1:02d}_kept"], axis=1)
    if noise:
        logits, seen = run(weights, common.nhwc(golden.x["image"]), train=True)
        decisions = [seen[f"block{block + 1:02d}_decision"] for block in at]
        outputs |= {"train/logits": logits, "train/final_mask": decisions[-1][..., None]}
        outputs |= {f"train/decision{stage}": decision for stage, decision in enumerate(decisions)}
    if "softmax_with_policy" in golden.y:
        scores, policy = (jnp.asarray(golden.x[f"softmax_policy_{name}"]) for name in ("attn", "mask"))
        outputs["softmax_with_policy"] = policies.softmax(scores, policy.reshape(policy.shape[:2]))
    return outputs | (_losses(golden, len(at)) if "loss/value" in golden.y else {})


def _losses(golden: Golden, stages: int) -> dict:
    stated, x = golden.meta["loss"], {name: jnp.asarray(value) for name, value in golden.x.items()}
    options = {"ratio_weight": "ratio_weight", "distill_weight": "distill_weight", "clf_weight": "label_weight"}
    options = {ours: stated[theirs] for theirs, ours in options.items() if theirs in stated}

    def loss(logits, tokens, decisions):
        label = jnp.mean(cross_entropy(logits, x["labels"]))
        teacher = x["teacher_cls"], x["teacher_tokens"]
        kind = "mse" if stated["mse_token"] else "kl"
        return dynamicvit_losses.total(
            label, (logits, tokens), teacher, decisions, stated["keep_ratio"], kind=kind, **options
        )[0]

    decisions = [jnp.asarray(golden.y[f"train/decision{stage}"]) for stage in range(stages)]
    arguments = jnp.asarray(golden.y["train/logits"]), x["train_features"], decisions
    value, (logits, tokens, decisions) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)
    outputs = {"loss/value": value, "loss/grad_pred": logits, "loss/grad_tokens": tokens}
    outputs |= {f"loss/grad_score{stage}": decision for stage, decision in enumerate(decisions)}
    for key in golden.y:
        if match := re.fullmatch(r"(loss/grad_\w+?)_(first(\d+)|rowmean|l2_per_token)", key):
            whole = outputs[match[1]]
            if match[3]:
                outputs[key] = whole[:, : int(match[3])]
            else:
                outputs[key] = jnp.mean(whole, 1) if match[2] == "rowmean" else jnp.linalg.norm(whole, axis=-1)
    return outputs


def check_ats_sampling(golden: Golden) -> dict:
    """Scores, cumulated scores, steps, and the tokens and attention rows that survive."""
    attention = jax.nn.softmax(jnp.asarray(golden.x["attn_logits"]), axis=-1)
    count = golden.meta["n_ref_tokens"] - 1
    # The file has the products of queries and keys; with these as queries, unit vectors as keys give them back.
    logits = jnp.asarray(golden.x["attn_logits"])
    keys = jnp.broadcast_to(jnp.eye(logits.shape[-1], dtype=logits.dtype), logits.shape)
    scores = significance(logits, keys, jnp.asarray(golden.x["v"]), scale=jnp.ones((), logits.dtype))
    ascending, order, sums = ats.cumulated(scores)
    sample = jax.jit(functools.partial(ats.sample, count=count))(scores)
    kept = golden.y["policy"].shape[1] - 1
    chosen = policies.behind(1, sample.order[:, :kept])
    policy = jnp.pad(sample.kept[:, :kept].astype(scores.dtype), ((0, 0), (1, 0)), constant_values=1)
    return {
        "sorted_scores": ascending,
        "sorted_indices": order,
        "normalized_cdf": sums,
        "ys": ats.targets(sums, count),
        "selected_x": rows(jnp.asarray(golden.x["raw_x"]), chosen) * policy[..., None],
        "selected_attn": jax.vmap(lambda a, i: a[:, i])(attention, chosen) * policy[:, None, :, None],
        "policy": policy.reshape(golden.y["policy"].shape),
    }


def check_evo_vit(golden: Golden) -> dict:
    """A whole network in evaluation and, with dropout off, in training: order of the patches, tokens, logits."""
    kwargs = dict(golden.kwargs)
    ratio, tradeoff = kwargs.pop("prune_ratio", None), kwargs.pop("tradeoff", 0.5)
    stages = ((4, 8), (8, None if kwargs.pop("prunecls", False) else 12))
    keep = (0.5, 0.5) if ratio is None else (ratio[4], ratio[8])
    kwargs = arguments(dataclasses.replace(golden, meta={"kwargs": kwargs}), *NEUTRAL)
    tradeoff = tuple(tradeoff) if isinstance(tradeoff, list) else tradeoff
    reduce = evo_vit.reduction(stages, keep, tradeoff=tradeoff)
    model = evo_vit.build(**{**kwargs, "depth": 12}, reduce=reduce)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), common.nhwc(golden.x["image"]))
    weights = from_official(shapes, evo_vit.to_deit(golden.w), evo_vit.NAMES)
    run = jax.jit(model.apply, static_argnames="train")
    logits, seen = run(weights, common.nhwc(golden.x["image"]))
    training, heads = run(weights, common.nhwc(golden.x["image"]), train=True)
    outputs = {"logits": logits, "train/logits": training, "train/logits_cls": heads["head_cls"]}
    for stage, (first, _) in enumerate(model.reduce.stages):
        outputs[f"stage{stage}/sorted_cls_attn"] = seen[f"block{first + 1:02d}_attention"]
        outputs[f"stage{stage}/sort_idx"] = seen[f"block{first + 1:02d}_order"]
    for key in golden.y:
        if match := re.fullmatch(r"block(\d+)/tokens_out", key):
            block = seen[f"block{int(match[1]) + 1:02d}"]
            outputs[key] = block[:, : golden.y[key].shape[1]]
    return outputs


CHECKS = {"dynamicvit": check_dynamicvit, "ats_sampling": check_ats_sampling, "evo_vit": check_evo_vit}
