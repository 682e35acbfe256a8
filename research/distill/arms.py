"""The students of a KD config, each an arm: a network, its losses, what they weigh and when, its optimiser."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from research.backbones import classify, teachers
from research.core import config as configs
from research.core import optim, schedules, scope
from research.distill import dot, hints, losses

DOT = "dot"  # optimizer.name of an arm whose two losses have a momentum each
OPTIONS = "loss_options"
WEIGHTS = ("label_weight", "loss_weight", "hint_weight")
PARTS = ("task", "kd")


class Arm(NamedTuple):
    """One student: its network, its losses and its weights in the sum.

    Attributes:
      label_loss: (logits, targets) -> scalar mean.
      loss: (student, teacher, targets, **scheduled options) -> scalar mean; None without.
      views, several: whether `loss` takes `multilevel.Views`, and the logits of all teachers (K, B, C).
      hint: a hint method, or None.
      inherit: name in the hint's state -> function of the teacher's parameters that gives its value at every step.
      values: epoch -> {name of a weight: value, "loss_options": those that are scheduled}.
      smoothing: label smoothing of the mixed targets.
    """

    network: classify.Network
    label_loss: Callable
    loss: Callable | None
    views: bool
    several: bool
    hint: hints.Hint | None
    inherit: Mapping[str, Callable]
    values: Callable[[jax.Array], dict]
    smoothing: float


def arm(student: Mapping, config, labels: Callable[[], np.ndarray] | None, networks: teachers.Networks) -> Arm:
    """The Arm of a student's section.

    Raises:
      ValueError: unknown losses or models, a wrong schedule.
    """
    group = student.group or None
    network = classify.network(
        student.model, config.data.num_classes, config.augment.size, dtype=student.dtype, **student.options
    )
    label = losses.pick(losses.LABEL_LOSSES, student.label_loss)
    hint, inherit = _hint(student, config, labels, networks, group)
    return Arm(
        network,
        _mean(label, False, None),
        _loss(student, group) if student.loss else None,
        student.loss in losses.TWO_VIEWS,
        student.loss in losses.ENSEMBLE,
        hint,
        inherit,
        _values(student),
        student.smoothing,
    )


def _mean(function: Callable, relational: bool, group: int | None) -> Callable:
    """The scalar form of a loss: a mean over examples, or over groups where examples are related to each other."""
    if relational:
        return lambda *arrays, **options: scope.by_group(functools.partial(function, **options), group, *arrays)
    return lambda *arrays, **options: jnp.mean(function(*arrays, **options))


def _loss(student: Mapping, group: int | None) -> Callable:
    if student.loss in losses.TWO_VIEWS:
        function = functools.partial(losses.TWO_VIEWS[student.loss], **student.loss_options)
        terms = lambda *arrays, **options: sum(function(*arrays, **options))
        return _mean(terms, True, group)
    function = losses.pick({**losses.LOSSES, **losses.TWO_VIEWS}, student.loss)
    return _mean(functools.partial(function, **student.loss_options), student.loss in losses.RELATIONAL, group)


def _hint(student, config, labels, networks, group) -> tuple[hints.Hint | None, dict[str, Callable]]:
    if not student.hint:
        return None, {}
    options, inherit = dict(student.hint_options), {}
    if student.hint == "crd":
        options |= {"num_examples": config.data.num_examples, "classes": labels() if labels else None}
    if student.hint in ("srrl", "ofd") and teachers.TEACHER in networks:
        params, _ = jax.eval_shape(networks[teachers.TEACHER].init, jax.random.PRNGKey(0))
        name = {"srrl": "classifier", "ofd": "norms"}[student.hint]
        take = {
            "srrl": functools.partial(teachers.classifier, num_classes=config.data.num_classes),
            "ofd": teachers.stage_norms,
        }[student.hint]
        if shapes := take(params):
            zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
            options |= zeros if student.hint == "srrl" else {name: zeros}
            inherit[name] = take
    builder = losses.hint(student.hint)
    if group and "group" in inspect.signature(builder).parameters:  # the others look at examples one by one
        options["group"] = group
    return hints.Hint(*builder(**options)), inherit


def _values(student: Mapping) -> Callable[[jax.Array], dict]:
    """epoch -> the weights and `loss_options` as they are then: constant, or by `student.schedule`, which is alike."""
    constant = {name: getattr(student, name) for name in WEIGHTS}
    points = dict(student.get("schedule", {}))  # not in runs of earlier versions
    inner = dict(points.pop(OPTIONS, {}))
    for given, known in ((points, WEIGHTS), (inner, tuple(student.loss_options))):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"schedule of {unknown[0]!r}: there {'are' if known else 'is'} {', '.join(known) or 'none'}"
            )
    curves, inner = ({name: _curve(name, value) for name, value in given.items()} for given in (points, inner))

    def values(epoch):
        options = {name: curve(epoch) for name, curve in inner.items()}
        return constant | {name: curve(epoch) for name, curve in curves.items()} | {OPTIONS: options}

    return values


def _curve(name: str, points: Sequence[tuple[float, float]]) -> Callable[[jax.Array], jax.Array]:
    epochs, values = (np.asarray(column, np.float32) for column in zip(*points, strict=True))
    if np.any(np.diff(epochs) <= 0):
        raise ValueError(f"schedule of {name!r}: epochs {', '.join(f'{epoch:g}' for epoch in epochs)} have to grow")
    return lambda epoch: jnp.interp(epoch, epochs, values)


def optimizer(config, student: Mapping):
    """(gradient transformation, schedule) of one arm: the config's sections with the arm's own values over them.

    `groups` among the options count in epochs, not steps. `name="dot"` is DOT: plain SGD with a momentum for each of
    two gradients, see `by_parts`; it takes `momentum`, `delta` and `weight_decay`.

    Raises:
      ValueError: an unknown name, DOT with clipping.
    """
    options = {**config.optimizer, **student.optimizer}
    extra, lr = dict(options.pop("options")), options.pop("lr")
    if "groups" in extra:
        extra["groups"] = [(*group, round(first * config.steps_per_epoch)) for *group, first in extra["groups"]]
    schedule = schedules.schedule(lr=lr, steps=config.steps, steps_per_epoch=config.steps_per_epoch, **config.schedule)
    if options["name"] == DOT:
        del options["name"]
        if options.pop("clip"):
            raise ValueError("optimizer 'dot' clips no gradients: set this arm's optimizer.clip to 0")
        decayed = {key: extra.pop(key) for key in ("no_decay", "decay_anyway") if key in extra}
        mask = functools.partial(optim.decayed, **decayed)
        return dot.dot(schedule, mask=mask, **options, **extra), schedule
    return optim.optimizer(lr=schedule, **options, **extra), schedule


def by_parts(config, optimizers: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """`optim.by_name` of gradients that come in PARTS: arms under DOT get both, the others their sum.

    A distillation loss alone reaches the adaptors, which DOT has to be told.
    """
    apart = {name for name, student in config.students.items() if student.optimizer.get("name", "") == DOT}
    apart = apart or (set(optimizers) if config.optimizer.name == DOT else set())

    def update(updates, state, params=None):
        task, kd = (updates[part] for part in PARTS)
        given = {name: jax.tree.map(jnp.add, task[name], kd[name]) for name in optimizers if name not in apart}
        for name in apart:
            none = jax.tree.map(lambda _: None, task[name]["adaptor"])
            given[name] = dot.Gradients({**task[name], "adaptor": none}, kd[name])
        return together.update(given, state, params)

    together = optim.by_name(optimizers)
    return optax.GradientTransformation(together.init, update)


def stages(config) -> list[tuple[int, ConfigDict]]:
    """(step before which it holds, config) of all stages of a resolved config but the last, which is that config.

    A student's section `stages` mirrors its `options` where these change: leaves are ((epoch, value), ...), each value
    that of the option until the epoch. From the last one on, and in every evaluation, `options` hold.

    Raises:
      ValueError: epochs that do not ascend, options that the student does not have.
    """
    changes: dict[tuple[str, ...], list[tuple[int, Any]]] = {}
    for name, student in config.students.items():
        for path, points in _leaves(student.get("stages", {})):  # not in runs of earlier versions
            place, steps = ".".join(path), [round(epoch * config.steps_per_epoch) for epoch, _ in points]
            if steps != sorted(set(steps)) or steps[0] < 1:
                raise ValueError(f"students.{name}.stages.{place}: epochs have to ascend, by a step or more")
            if place not in configs.flat(student.options):
                raise ValueError(f"students.{name}.stages.{place}: there is no students.{name}.options.{place}")
            changes[name, "options", *path] = [(step, value) for step, (_, value) in zip(steps, points, strict=True)]
    ends = sorted({step for points in changes.values() for step, _ in points})
    return [(end, _changed(config, changes, end)) for end in ends]


def _leaves(tree: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Sequence]]:
    for name, value in tree.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _changed(config, changes: Mapping[tuple[str, ...], Sequence[tuple[int, Any]]], end: int) -> ConfigDict:
    """The config as it is before the step `end`, which is the end of a stage."""
    found = config.copy_and_resolve_references().unlock()
    for path, points in changes.items():
        for value in [value for step, value in points if step >= end][:1]:
            node = found.students
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = value
    return found.lock()


def needs_parts(config) -> bool:
    """Whether an arm's optimiser asks for the gradients of its two losses apart."""
    named = [student.optimizer.get("name", config.optimizer.name) for student in config.students.values()]
    return DOT in named


def init_hint(found: Arm, networks: teachers.Networks, text_width: int, key: jax.Array):
    """(adaptor parameters, adaptor state) for the endpoints the two networks have; both empty without a hint."""
    if found.hint is None:
        return {}, {}
    taught = endpoints(networks[teachers.TEACHER]) if networks else {}
    if text_width:
        taught["text"] = jax.ShapeDtypeStruct((2, text_width), jnp.float32)
    return found.hint.init(key, endpoints(found.network), taught)


def endpoints(network: classify.Network) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a network's endpoints and `logits` for two images."""
    images = jax.ShapeDtypeStruct((2, network.size, network.size, 3), jnp.float32)
    forward = lambda images: network.apply(*network.init(jax.random.PRNGKey(0)), images)
    logits, found, _ = jax.eval_shape(forward, images)
    return {**found, "logits": logits}
