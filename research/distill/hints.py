"""Hint methods behind one interface: losses on endpoints, with trained adaptors and state of their own.

A builder takes the options of a method and returns a `Hint` of pure functions. The adaptors' parameters are trained by
the student's optimiser, so they belong beside the student's own; `state` is what changes without gradients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.core import scope
from research.distill import features, memory, numerics, relations, taps
from research.distill.taps import Endpoints


class Hint(NamedTuple):
    """A hint method.

    Attributes:
      init: (key, student, teacher) -> (params, state). Endpoints may be shapes: run it under `jax.eval_shape` or jit.
      apply: (params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0) -> (loss, state).
        The loss is a scalar, the mean over the batch, unweighted. `labels` (B,) or (B, C), `index` (B,) the examples'
        positions in the training set, `key` the step's randomness, `epoch` a scalar that may be traced. Endpoints
        include the `logits`.
    """

    init: Callable[..., tuple[Any, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]


def zeros(endpoints: Endpoints) -> Endpoints:
    """Arrays of zeros in place of the endpoints or their shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), endpoints)


def adapted(call: Callable, loss: Callable, *, normed: bool = True) -> Hint:
    """A Hint of a module and a per-example loss.

    Args:
      call: (student, teacher, key) -> (module, its arguments).
      loss: (adaptor's output, teacher endpoints, epoch) -> (B,).
      normed: whether the module takes `train`, for its batch norms.
    """
    options = {"train": False} if normed else {}

    def init(key, student, teacher):
        module, arguments = call(zeros(student), zeros(teacher), key)
        variables = module.init(key, *arguments, **options)
        return variables["params"], {"batch_stats": variables.get("batch_stats", {})}

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        module, arguments = call(student, teacher, key)
        out, state = module.apply({"params": params, **state}, *arguments, mutable=["batch_stats"])
        return jnp.mean(loss(out, teacher, epoch)), {"batch_stats": state.get("batch_stats", {})}

    return Hint(init, apply)


def fitnet(
    *,
    student: str = "stage2",
    teacher: str = "stage2",
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """FitNet: mean squared error between one of the teacher's maps and the student's through a `ConvReg`.

    Args:
      student, teacher: endpoint names; mdistiller distils the second stage, with weight 100.
      group: examples a batch-norm group of the adaptor.
    """
    names = {"student": student, "teacher": teacher}

    def call(student, teacher, key):
        target = taps.feature_map(teacher, names["teacher"])
        module = features.ConvReg(target.shape[-1], target.shape[1:3], group=group, dtype=dtype)
        return module, (taps.feature_map(student, names["student"]),)

    def loss(out, teacher, epoch):
        return features.mse(out, taps.feature_map(teacher, names["teacher"]))

    return adapted(call, loss)


def review(
    *,
    student: tuple[str, ...] | None = None,
    teacher: tuple[str, ...] | None = None,
    max_mid: int = 512,
    warmup_epochs: float = 1.0,
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """ReviewKD: the student's levels fused from deep to shallow, against the teacher's by hierarchical context loss.

    Args:
      student, teacher: endpoint names, shallow to deep, `pooled` follows by itself; None takes `taps.pyramid`.
      max_mid: bound of the fused maps' width.
      warmup_epochs: epochs over which the loss grows from 0; with epochs counted from 0 the first has no hint at all.
      group: examples a batch-norm group of the adaptors.
    """
    names = {"student": student, "teacher": teacher}

    def call(student, teacher, key):
        shapes = [x.shape[1:] for x in taps.levels(teacher, names["teacher"])]
        module = features.Review(max_mid, group=group, dtype=dtype)
        return module, (taps.levels(student, names["student"]), shapes)

    def loss(out, teacher, epoch):
        values = features.review(out, taps.levels(teacher, names["teacher"]))
        return values * numerics.warmup(epoch, warmup_epochs).astype(values.dtype)

    return adapted(call, loss)


def _embedded(student: str, teacher: str, module: memory.EmbedPair):
    def init(key, student_endpoints, teacher_endpoints):
        arguments = taps.tap(zeros(student_endpoints), student), taps.tap(zeros(teacher_endpoints), teacher)
        return module.init(key, *arguments)["params"]

    def apply(params, student_endpoints, teacher_endpoints):
        arguments = taps.tap(student_endpoints, student), taps.tap(teacher_endpoints, teacher)
        return module.apply({"params": params}, *arguments)

    return init, apply


def cc(
    *,
    student: str = "pooled",
    teacher: str = "pooled",
    dim: int = 128,
    scale: float = 0.02,
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Correlation congruence of linear embeddings of width `dim`, over groups of `group` examples (None: the batch)."""
    embed_init, embed = _embedded(student, teacher, memory.EmbedPair(dim, normalize=False, dtype=dtype))

    def init(key, student, teacher):
        return embed_init(key, student, teacher), {}

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        loss = lambda s, t: relations.cc(s, t, scale=scale)
        return scope.by_group(loss, group, *embed(params, student, teacher)), state

    return Hint(init, apply)


def rkd(
    *,
    student: str = "pooled",
    teacher: str = "pooled",
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    group: int | None = None,
) -> Hint:
    """Relational distillation of distances and angles, over groups of `group` examples (None: the batch)."""
    names = {"student": student, "teacher": teacher}

    def init(key, student, teacher):
        return {}, {}

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        def loss(s, t):
            s, t = (x.reshape(x.shape[0], -1) for x in (s, t))
            return relations.rkd(s, t, distance_weight=distance_weight, angle_weight=angle_weight)

        pair = taps.tap(student, names["student"]), taps.tap(teacher, names["teacher"])
        return scope.by_group(loss, group, *pair), state

    return Hint(init, apply)


def crd(
    num_examples: int,
    *,
    classes: np.ndarray | None = None,
    student: str = "pooled",
    teacher: str = "pooled",
    dim: int = 128,
    negatives: int = 16384,
    temperature: float = 0.07,
    momentum: float = 0.5,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Contrastive representation distillation against a memory of the whole training set.

    The batch scores and enters the memory as a whole, whatever the devices.

    Args:
      num_examples: size N of the training set; the memory is two (N, dim) arrays.
      classes: (N,) classes of the training set, from which negatives of other classes are drawn. None draws them from
        all other examples.
      negatives: negatives an example, drawn with replacement.
    Raises:
      ValueError: `classes` is not of N examples; at apply, no index or key.
    """
    classes = np.arange(num_examples) if classes is None else np.asarray(classes)
    if classes.shape != (num_examples,):
        raise ValueError(f"crd: classes of shape {classes.shape} for a training set of {num_examples} examples")
    sample = memory.negative_sampler(classes, negatives)
    embed_init, embed = _embedded(student, teacher, memory.EmbedPair(dim, dtype=dtype))

    def init(key, student, teacher):
        embed_key, memory_key = jax.random.split(key)
        return embed_init(embed_key, student, teacher), memory.empty(memory_key, num_examples, dim)

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        if index is None or key is None:
            raise ValueError("crd needs each example's index in the training set (batch['index']) and a random key")
        embedded = embed(params, student, teacher)
        loss, state = memory.crd(
            *embedded, state, index, sample(key, index), temperature=temperature, momentum=momentum
        )
        return jnp.mean(loss), state

    return Hint(init, apply)
