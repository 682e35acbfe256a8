"""What DynamicViT is trained with beside the labels: keep the asked share of patches, and stay close to the teacher.

Source: Rao et al. 2021 (arXiv 2106.02034), equations 13-18, as in the official `DistillDiffPruningLoss_dynamic`.
`hint` is what an arm of `research.distill.vanilla_kd` states as `hint='research.tokens.dynamicvit_losses'`, beside
`label_loss='ce'`, a student with `reduce` of `research.tokens.dynamicvit`, and the dense network as teacher.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from research.core import scope


def _wide(*arrays: jax.Array) -> list[jax.Array]:
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32
    return [x.astype(dtype) for x in arrays]


def _divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student) of logits over the last axis."""
    student, teacher = (jax.nn.log_softmax(x, axis=-1) for x in _wide(student, teacher))
    return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def ratio(decisions: Sequence[jax.Array], keep: Sequence[float]) -> jax.Array:
    """Squared distance of each image's share of kept patches to the rate, mean over stages, (B,) (equation 17).

    Args:
      decisions: of each stage, (B, N).
      keep: rate of each stage, relative to all N patches.
    Raises:
      ValueError: another number of rates than of stages.
    """
    if len(decisions) != len(keep):
        raise ValueError(f"{len(decisions)} stages of decisions and {len(keep)} rates: give one rate a stage")
    shares = [jnp.mean(decision, axis=1) for decision in _wide(*decisions)]
    return sum(jnp.square(share - rate) for share, rate in zip(shares, keep, strict=True)) / len(keep)


def distillation(logits: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher || student) of logits (B, C), (B,) (equation 16)."""
    return _divergence(logits, jax.lax.stop_gradient(teacher))


def token(tokens: jax.Array, teacher: jax.Array, mask: jax.Array, kind: str = "mse") -> jax.Array:
    """Distance of the kept patches to the teacher's, a scalar; 0 where none is kept (equation 15).

    Args:
      tokens, teacher: patches after the final norm, (B, N, C), or logits of patches, (B, N, classes), for LV-ViT.
      mask: the last stage's decisions (B, N); no gradient goes to them.
      kind: `mse`, the mean of squared differences (ViT, DeiT), or `kl`, of the softmax over channels, mean over the
        patches kept in the whole batch (LV-ViT).
    Raises:
      ValueError: an unknown kind.
    """
    kept = jax.lax.stop_gradient(mask) > 0.5
    tokens, teacher = _wide(tokens, jax.lax.stop_gradient(teacher))
    if kind == "mse":
        distance = jnp.mean(jnp.square(tokens - teacher), axis=-1)
    elif kind == "kl":
        distance = _divergence(tokens, teacher)
    else:
        raise ValueError(f"kind: {kind!r} is neither 'mse' nor 'kl'")
    return jnp.sum(jnp.where(kept, distance, 0)) / jnp.maximum(jnp.sum(kept), 1).astype(distance.dtype)


def total(
    label_loss: jax.Array,
    student: tuple[jax.Array, jax.Array],
    teacher: tuple[jax.Array, jax.Array],
    decisions: Sequence[jax.Array],
    keep: Sequence[float],
    *,
    label_weight: float = 1.0,
    ratio_weight: float = 2.0,
    distill_weight: float = 0.5,
    kind: str = "mse",
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The whole objective of fine-tuning (equation 18): (scalar, its terms before weighting).

    Args:
      label_loss: what the labels ask, a scalar or (B,).
      student, teacher: logits (B, C) and patches (B, N, C) of both networks.
      decisions, keep: see `ratio`; the last decisions mask the patches of `token`.
      ratio_weight: 2 for most networks, 5 for DeiT-B.
      distill_weight: of both terms with the teacher.
      kind: see `token`.
    """
    terms = {
        "label": jnp.mean(label_loss),
        "ratio": jnp.mean(ratio(decisions, keep)),
        "distillation": jnp.mean(distillation(student[0], teacher[0])),
        "token": token(student[1], teacher[1], decisions[-1], kind),
    }
    weights = {"label": label_weight, "ratio": ratio_weight, "distillation": distill_weight, "token": distill_weight}
    return sum(weights[name] * value for name, value in terms.items()), terms


def hint(
    *,
    keep: float | Sequence[float] = 0.7,
    ratio_weight: float = 2.0,
    distill_weight: float = 0.5,
    kind: str = "mse",
    endpoint: str = "tokens",
    group: int | None = None,
) -> tuple[Callable, Callable]:
    """All terms of `total` but the labels', as the (init, apply) of a `research.distill.hints.Hint` without parameters.

    Args:
      keep: as the student's reduction has it: a rate a stage, or r for r, r^2, r^3 ...
      ratio_weight, distill_weight, kind: see `total`.
      endpoint: of both networks, whose last N tokens are the patches: `tokens`, or `aux` for LV-ViT with `kind="kl"`.
      group: examples whose kept patches `token` averages together, as a GPU had them; None: the global batch.
    Raises:
      ValueError: at the first use, a student without predictors, or with another number of them than rates.
    """

    def rates(stages: int) -> tuple[float, ...]:
        found = tuple(keep ** (stage + 1) for stage in range(stages)) if isinstance(keep, float | int) else tuple(keep)
        if not stages or len(found) != stages:
            given = "keep=" + (f"{keep}" if isinstance(keep, float | int) else f"{len(found)} rates")
            raise ValueError(
                f"the student has {stages} predictors of DynamicViT and the loss {given}: set the student's"
                " options.reduce.method='research.tokens.dynamicvit', and the loss's `keep` to that of the reduction"
            )
        return found

    def init(key, student, teacher):
        rates(len(_recorded(student, "log_probs")))
        return {}, {}

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        decisions = _recorded(student, "decision")
        wanted = rates(len(decisions))

        def mean(student, teacher, decisions):
            weights = dict(ratio_weight=ratio_weight, distill_weight=distill_weight, kind=kind)
            return total(jnp.zeros(()), student, teacher, decisions, wanted, **weights)[0]

        patches = decisions[-1].shape[1]
        seen = [(found["logits"], found[endpoint][:, -patches:]) for found in (student, teacher)]
        return scope.by_group(mean, group, *seen, decisions), state

    return init, apply


def _recorded(endpoints: Mapping[str, jax.Array], name: str) -> list[jax.Array]:
    """What the predictors recorded under `blockNN_<name>`, in order."""
    return [endpoints[key] for key in sorted(endpoints) if re.fullmatch(rf"block\d+_{name}", key)]
