"""Distillation from stored labels: as what a teacher's outputs are stored, and what training makes of them.

`label` and `label_map` are run once by `python -m launch.labels`; `known` and `targets` read the batches that
research.data.labelled_views makes. With all classes kept, `known` gives the teacher's logits to float32 precision, and
every loss of logits has the value and gradient that it has with the teacher running beside.

Sources: Faghri et al. 2023, "Reinforce Data, Multiply Impact" (apple/ml-dr); Shen & Xing 2022 (FKD); Shen & Savvides
2020 (MEAL V2); Yun et al. 2021 (ReLabel).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.backbones import classify
from research.core import sharding
from research.data import mixup
from research.distill import arms, stored_labels
from research.distill.numerics import wide

SMALLEST = 1e-30  # probability that stands for none at all, so that its logarithm is finite


def label(logits: jax.Array, k: int) -> dict[str, jax.Array]:
    """What is stored of logits (B, C), or (K, B, C) of K teachers whose probabilities are averaged.

    Returns:
      lse (B,): log-sum-exp of the logits (its mean over teachers); logp (B, k): the largest log-probabilities, by
      ascending class; classes (B, k) int32, only where k < C.
    Raises:
      ValueError: k is not between 1 and C.
    """
    (logits,) = wide(logits if logits.ndim == 3 else logits[None])
    lse = jax.nn.logsumexp(logits, axis=-1)
    logp = jax.nn.logsumexp(logits - lse[..., None], axis=0) - jnp.log(jnp.asarray(len(logits), logits.dtype))
    found = {"lse": jnp.mean(lse, axis=0)}
    if k == logp.shape[-1]:
        return found | {"logp": logp}
    classes, logp = stored_labels.sparsify(logp, k)
    return found | {"logp": logp, "classes": classes}


def known(batch: Mapping[str, jax.Array], num_classes: int, *, form: str = "smooth") -> jax.Array:
    """The teacher's logits (B, C) of a batch of labelled views, at least float32; constants.

    Where fewer than all classes are stored, the logits are those of the distribution that `stored_labels.densify`
    makes of them in this `form`.

    Raises:
      ValueError: another form.
    """
    logp, lse = wide(batch["known_logp"], batch["known_lse"])
    if "known_classes" in batch:
        dense = stored_labels.densify(batch["known_classes"], jnp.exp(logp), num_classes, form=form)
        logp = jnp.log(jnp.maximum(dense, SMALLEST))
    return jax.lax.stop_gradient(logp + lse[:, None])


def targets(batch: Mapping[str, jax.Array], num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """Label targets (B, C) of a batch of views: `mixup.mixed_target` with each example's own partner and share."""
    share = batch["lam"][:, None]
    return mixup.mixed_target(
        batch["label"], share, num_classes=num_classes, smoothing=smoothing, partners=batch["partner"]
    )


def form_of(config) -> str:
    """How a config's stored labels become distributions, `teacher.densify`; empty where it stores none.

    Raises:
      ValueError: another form than those of `stored_labels.densify`.
    """
    t = config.teacher
    if not t.get("labels"):
        return ""
    if t.densify not in stored_labels.FORMS:
        raise ValueError(f"teacher.densify={t.densify!r}: choose one of {', '.join(stored_labels.FORMS)}")
    return t.densify


def init_hint(arm: arms.Arm, key: jax.Array, num_classes: int, name: str) -> tuple:
    """(adaptor parameters, adaptor state) of an arm's hint with a teacher of which the logits alone are known.

    Args:
      arm: with a hint.
      key: of the adaptor's parameters.
      num_classes: C.
      name: of the config key that chose it.
    Raises:
      ValueError: it needs the teacher's features.
    """
    try:
        teacher = {"logits": jax.ShapeDtypeStruct((2, num_classes), jnp.float32)}
        return arm.hint.init(key, arms.endpoints(arm.network), teacher)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{name} needs features of the teacher, but teacher.labels stores its logits alone ({error}): "
            "leave the hint out, or train without teacher.labels"
        ) from None


class Head(NamedTuple):
    """A linear classifier on a mean over positions.

    Attributes:
      endpoint: name of the endpoint, (B, h, w, d) or (B, h * w, d), whose mean over positions it classifies.
      path: of the layer's parameters.
    """

    endpoint: str
    path: tuple[str, ...]


def find_head(network: classify.Network, params, model_state) -> Head:
    """The pooled linear head of a network, found by trying: which endpoint's mean, through which layer, is the logits.

    Raises:
      ValueError: it has none, like networks that normalise after pooling or classify a token.
    """
    images = jax.random.uniform(jax.random.PRNGKey(0), (2, network.size, network.size, 3))
    logits, endpoints, _ = jax.jit(network.apply)(params, model_state, images)
    for path, kernel in reversed(sharding.paths(params)):
        *layer, name = path.split("/")
        if name != "kernel" or kernel.ndim != 2 or kernel.shape[-1] != logits.shape[-1]:
            continue
        for endpoint, found in endpoints.items():
            if found.ndim not in (3, 4) or found.shape[-1] != len(kernel):
                continue
            pooled = jnp.mean(found.astype(jnp.float32), axis=tuple(range(1, found.ndim - 1)))
            if _close(_linear(_at(params, layer), pooled), logits, network.module.dtype):
                return Head(endpoint, tuple(layer))
    raise ValueError(
        f"--form maps: {network.name} has no linear head on the mean of a feature map, so there is no map of its "
        "scores; label crops instead (--form crops), or take a teacher such as a ResNet"
    )


def label_map(network: classify.Network, head: Head, k: int) -> Callable:
    """(params, model_state, images (B, H, W, 3)) -> {scores, classes} (B, h, w, k): ReLabel's maps.

    The head classifies every position of its map, as a 1x1 convolution; the k largest scores are kept, largest first.
    """

    def apply(params, model_state, images):
        _, endpoints, _ = network.apply(params, model_state, images)
        found = endpoints[head.endpoint].astype(jnp.float32)
        if found.ndim == 3:
            side = round(found.shape[1] ** 0.5)
            if side * side != found.shape[1]:
                raise ValueError(f"--form maps: the {found.shape[1]} tokens of {network.name} are no square map")
            found = found.reshape(len(found), side, side, -1)
        scores, classes = jax.lax.top_k(_linear(_at(params, head.path), found), k)
        return {"scores": scores, "classes": classes}

    return apply


def _at(params, path):
    for name in path:
        params = params[name]
    return params


def _linear(layer, x):
    kernel, *bias = (layer[name].astype(jnp.float32) for name in ("kernel", "bias") if name in layer)
    out = jnp.einsum("...d,dc->...c", x, kernel, precision=jax.lax.Precision.HIGHEST)
    return out + bias[0].reshape((1,) * (out.ndim - 1) + (-1,)) if bias else out


def _close(a, b, dtype) -> bool:
    """Equal but for rounding in `dtype`, and not merely zero."""
    scale = jnp.max(jnp.abs(b))
    rounding = 1e-4 if jnp.finfo(dtype).bits >= 32 else 2e-2
    return bool(scale > 0) and bool(jnp.max(jnp.abs(a - b)) <= rounding * scale)
