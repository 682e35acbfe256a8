"""OFA-KD: the teacher's final logits distilled into exit branches all along a student of any architecture.

Source: "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", Hao et al. 2023
(arXiv 2310.19444). The whole of the method is

    gt_weight * CE(z_s, y) + kd_weight * ofa(z_s, z_t, y; eps) + ofa_weight * sum_k ofa(branch_k(f_k), z_t, y; eps_k)

which an arm of `research.distill.vanilla_kd` states as `label_loss='ce'`, `loss='ofa'` and `hint='ofa'` with their
weights. The branches (`research.distill.ofa_branches`) exist in training only.
"""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.distill import taps
from research.distill.ground_truth import hard
from research.distill.hints import Hint, zeros
from research.distill.numerics import expected, wide
from research.distill.ofa_branches import Branches

FORMS = ("code", "paper")


def ofa(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    eps: float = 1.0,
    temperature: float = 1.0,
    form: str = "code",
) -> jax.Array:
    """The adaptive target enhancement loss, (B,): a cross-entropy that trusts the teacher more where it is right.

    With p the teacher's probabilities and t the label's class, the student's -log q_c are weighted

        code:   p_c^eps for c != t, (1 + p_t)^eps - 1 for t   (the authors' code; eps = 1 is the soft cross-entropy)
        paper:  p_c for c != t, (1 + p_t)^eps for t           (equation 4, gamma for eps; the label's own term included)

    and summed over classes, without a factor T^2.

    Args:
      student, teacher: logits (B, C).
      labels: (B,) or (B, C), of which the largest class counts.
      eps: at least 1, may be traced; the authors use 1.0 to 1.5.
    Raises:
      ValueError: no labels, an unknown form.
    """
    if labels is None:
        raise ValueError("ofa enhances the class of the label: it needs labels")
    if form not in FORMS:
        raise ValueError(f"form={form!r}: choose 'code' or 'paper'")
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    own, known = (jax.nn.log_softmax(z / temperature) for z in (student, teacher))
    eps = jnp.asarray(eps, own.dtype)
    # expm1 and log1p keep the digits of targets that the teacher finds unlikely.
    raised = jnp.expm1(eps * jnp.log1p(jnp.exp(known)))
    if form == "code":
        target, others = raised, jnp.exp(eps * known)
    else:
        target, others = 1 + raised, jnp.exp(known)
    is_target = jax.nn.one_hot(hard(labels), own.shape[-1], dtype=jnp.bool_)
    return -expected(jnp.where(is_target, target, others), own)


def branch_features(endpoints: taps.Endpoints, names: Sequence[str]) -> tuple[list[jax.Array], int]:
    """The endpoints `names` as branches take them, and the number of prefix tokens among them.

    Networks with a `tokens` endpoint (ViT, Swin, MLPs) give tokens (B, N, C), all others maps (B, H, W, C). Prefix
    tokens are those beyond a square number.
    """
    found = [taps.tap(endpoints, name) for name in names]
    if "tokens" not in endpoints:
        return found, 0
    found = [x.reshape(x.shape[0], -1, x.shape[-1]) for x in found]
    return found, found[0].shape[1] - math.isqrt(found[0].shape[1]) ** 2


def stage_names(endpoints: taps.Endpoints) -> dict[int, str]:
    """The authors' taps: stage -> endpoint.

    Pyramids: their stages, the last after the last convolution (MobileNetV2's `features`). Networks of equal blocks:
    the second, the fourth, the last but two and the last (2, 4, 10, 12 of 12).

    Raises:
      ValueError: the network has neither.
    """
    stages = {int(name[5:]): name for name in endpoints if re.fullmatch(r"stage\d", name)}
    if stages:
        return stages | ({max(stages): "features"} if "features" in endpoints else {})
    blocks = sorted(name for name in endpoints if re.fullmatch(r"block\d+", name))
    if len(blocks) < 6:
        raise ValueError(f"no stages among the endpoints {', '.join(endpoints)}: name those of the `student` to distil")
    return dict(enumerate((blocks[1], blocks[3], blocks[-3], blocks[-1]), start=1))


def hint(
    *,
    stages: Sequence[int] = (1, 2, 3, 4),
    student: Sequence[str] | None = None,
    eps: float | Sequence[float] = 1.0,
    temperature: float = 1.0,
    form: str = "code",
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """The branches' part of OFA-KD: the sum over stages of `ofa` between a branch's logits and the teacher's.

    It needs labels, `logits` and `pooled` among the teacher's endpoints, and `pooled` among the student's.

    Args:
      stages: of the student, 1 to 4: they set the depth of the branches.
      student: endpoint names, one a stage; None takes `stage_names`.
      eps: of the loss, one for all stages or one each (the official list's last entry is that of `loss='ofa'`).
      group: examples a batch-norm group of convolutional branches.
    Raises:
      ValueError: stages, endpoints and eps of different lengths, stages beyond 1 to 4; at apply, no labels.
    """
    stages = tuple(stages)
    factors = tuple(eps) if isinstance(eps, Sequence) else (eps,) * len(stages)
    if len(factors) != len(stages) or (student is not None and len(student) != len(stages)):
        raise ValueError(f"ofa: {len(stages)} stages take one eps or {len(stages)}, and as many endpoints if any")
    if not set(stages) <= {1, 2, 3, 4}:
        raise ValueError(f"ofa: stages {stages} are not among 1, 2, 3, 4")

    def bind(endpoints, teacher):
        """(the branches, their inputs)"""
        names = student
        if names is None:
            known = stage_names(endpoints)
            if missing := [stage for stage in stages if stage not in known]:
                raise ValueError(f"ofa: the student has no stage {missing[0]}, only {', '.join(map(str, known))}")
            names = [known[stage] for stage in stages]
        found, prefix = branch_features(endpoints, names)
        widths = [taps.tap(network, "pooled").shape[-1] for network in (endpoints, teacher)]
        classes = taps.tap(teacher, "logits").shape[-1]
        return Branches(*widths, classes, prefix, group, dtype), dict(zip(stages, found, strict=True))

    def init(key, student, teacher):
        branches, inputs = bind(zeros(student), zeros(teacher))
        variables = branches.init(key, inputs, train=False)
        return variables["params"], {"batch_stats": variables.get("batch_stats", {})}

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        branches, inputs = bind(student, teacher)
        logits, state = branches.apply({"params": params, **state}, inputs, mutable=["batch_stats"])
        options = {"temperature": temperature, "form": form}
        losses = [
            jnp.mean(ofa(logits[stage], teacher["logits"], labels, eps=factor, **options))
            for stage, factor in zip(stages, factors, strict=True)
        ]
        return sum(losses), {"batch_stats": state.get("batch_stats", {})}

    return Hint(init, apply)
