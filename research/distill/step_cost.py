"""The programs whose times and memory say what a way of distilling costs: a step with it, without it, and it alone.

All take the teacher's outputs as arguments, so that its forward pass, which every way shares, is not in the difference.
"""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.backbones import classify, teachers
from research.core import config as configs
from research.core import cost
from research.data import mixup
from research.distill import arms, text_targets
from research.distill.hints import Hint


class Program(NamedTuple):
    """A compiled function with what the compiler says of it, and arguments to call it with."""

    run: Callable
    arguments: tuple
    cost: cost.Cost

    @property
    def bytes(self) -> int:
        """Arguments and temporaries."""
        return self.cost.argument_bytes + self.cost.temporary_bytes


class Way(NamedTuple):
    """The programs of one arm.

    Attributes:
      step: (model, adaptor, images, taught, extra) -> (model, adaptor), both given up to it; None where not asked for.
      alone: value and gradient of its losses in the student's outputs and the adaptor; None without losses.
      params: entries of the adaptor.
      student: equal for arms whose step is the same without their losses.
    """

    step: Program | None
    alone: Program | None
    params: int
    student: str


def compiled(function: Callable, *arguments, donate: tuple[int, ...] = ()) -> Program:
    """`function` compiled for these arguments; those of the positions `donate` are given up in each call."""
    found = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    return Program(found, arguments, cost.cost_of(found))


def batch_of(config) -> dict[str, jax.Array]:
    """A made-up batch of the config's size, as the pipeline gives it."""
    rng, rows = np.random.default_rng(0), config.batch_size
    images = rng.integers(0, 256, (rows, config.augment.size, config.augment.size, 3), dtype=np.uint8)
    labels = rng.integers(0, config.data.num_classes, rows, dtype=np.int32)
    index = rng.integers(0, config.data.num_examples, rows, dtype=np.int32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(labels), "index": jnp.asarray(index)}


def teacher_program(networks: teachers.Networks, batch: Mapping[str, jax.Array]) -> Program:
    """images -> what the training step asks of the teachers: endpoints, `logits`, and of several teachers `all`."""
    variables = jax.jit(functools.partial(teachers.frozen, networks))(jax.random.key(0))

    def forward(variables, images):
        known, taught = teachers.apply(networks, variables, classify.unit(images))
        return {**taught, **({"all": known} if len(known) > 1 else {})}

    return compiled(forward, variables, batch["image"])


def text_of(config, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The text targets that stand beside the teacher's endpoints; {} where the config has none."""
    if not config.teacher.get("text"):
        return {}
    width = text_targets.load(config.teacher.text, config.data.num_examples).embeddings.shape[1]
    return {"text": jnp.full((len(batch["image"]), width), width**-0.5)}


def objective(arm: arms.Arm) -> Hint | None:
    """Loss and hint of an arm, weighted and summed, as one Hint; None for an arm that learns from labels alone.

    What training takes from the teacher's parameters (`arm.inherit`) stays zero.
    Raises:
      ValueError: a loss of two views.
    """
    if arm.views:
        raise ValueError("its loss sees two views of every image")
    if not (arm.loss or arm.hint):
        return None

    def apply(params, state, seen, taught, *, labels, epoch, **extra):
        values, total = arm.values(epoch), jnp.zeros(())
        if arm.loss:
            known = taught["all"] if "all" in taught else taught["logits"][None]
            known = known if arm.several else teachers.combined(known)
            total += values["loss_weight"] * arm.loss(seen["logits"], known, labels, **values[arms.OPTIONS])
        if arm.hint:
            value, state = arm.hint.apply(params, state, seen, taught, labels=labels, epoch=epoch, **extra)
            total += values["hint_weight"] * value
        return total, state

    return Hint(arm.hint.init if arm.hint else lambda key, seen, taught: ({}, {}), apply)


def without(student: Mapping) -> str:
    """What names the step that an arm has without its losses: model, its options and the loss of labels."""
    plain = configs.plain(student)
    kept = ("model", "options", "dtype", "label_loss", "label_weight", "smoothing", "optimizer")
    return json.dumps({key: plain[key] for key in kept}, sort_keys=True)


def way(config, name: str, batch: Mapping[str, jax.Array], taught, *, whole=True) -> Way:
    """The programs of arm `name` of a resolved config; the classes that CRD takes from the data are made up.

    Args:
      batch: from `batch_of`.
      taught: the teacher's outputs, arrays.
      whole: compile the step too.
    Raises:
      ValueError: a loss or optimiser that asks more of a step than one batch and one gradient.
    """
    student = config.students[name]
    if (student.optimizer.get("name") or config.optimizer.name) == arms.DOT:
        raise ValueError("optimizer 'dot' takes two gradients a step")
    examples, classes = config.data.num_examples, config.data.num_classes
    arm = arms.arm(student, config, lambda: np.arange(examples) % classes, teachers.networks(config))
    key, network = jax.random.key(0), arm.network
    params, state = jax.jit(network.init)(key)
    shapes = jax.eval_shape(functools.partial(_outputs, network), params, state, batch["image"])
    term = _with_unused(objective(arm), shapes, taught)
    optimizer, _ = arms.optimizer(config, student)
    made = jax.jit(lambda key, taught: term.init(key, _zeros(shapes), taught)) if term else lambda *_: ({}, {})
    adaptor, adaptor_state = made(key, taught)
    targets = mixup.mixed_target(batch["label"], jnp.ones(()), num_classes=classes, smoothing=arm.smoothing)
    extra = {"labels": targets, "index": batch["index"], "key": key, "epoch": jnp.ones(())}

    def loss(params, states, images, taught, extra):
        logits, endpoints, state = network.apply(params[0], states[0], images, train=True, key=extra["key"])
        weight = arm.values(extra["epoch"])["label_weight"]
        value, after = weight * arm.label_loss(logits, extra["labels"]), states[1]
        if term:
            hinted, after = term.apply(params[1], states[1], {**endpoints, "logits": logits}, taught, **extra)
            value = value + hinted
        return value, (state, after)

    def step(model, adaptor, images, taught, extra):
        parts = model, adaptor
        params, states = (tuple(part[k] for part in parts) for k in (0, 1))
        grads, states = jax.grad(loss, has_aux=True)(params, states, classify.unit(images), taught, extra)
        new = []
        for k, part in enumerate(parts):
            updates, opt_state = optimizer.update(grads[k], part[2], params[k])
            new.append((optax.apply_updates(params[k], updates), states[k], opt_state))
        return tuple(new)

    model = params, state, optimizer.init(params)
    more = adaptor, adaptor_state, optimizer.init(adaptor)
    seen, taught = _used(term, adaptor, adaptor_state, shapes, taught, extra) if term else ({}, {})
    stepped = compiled(step, model, more, batch["image"], taught, extra, donate=(0, 1)) if whole else None
    # Copies, as the step gives its own up.
    copied = jax.tree.map(jnp.copy, (adaptor, adaptor_state))
    alone = _alone(term, *copied, seen, taught, extra) if term else None
    return Way(stepped, alone, cost.params_count(adaptor), without(student))


def _outputs(network: classify.Network, params, state, images) -> dict[str, jax.Array]:
    logits, endpoints, _ = network.apply(params, state, classify.unit(images))
    return {**endpoints, "logits": logits}


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _with_unused(term: Hint | None, seen, taught) -> Hint | None:
    """`term` of outputs some of which are left out, as it does not read them."""
    if term is None:
        return None
    shapes = tuple(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree) for tree in (seen, taught))

    def apply(params, state, seen, taught, **extra):
        whole = (_zeros(shape) | given for shape, given in zip(shapes, (seen, taught), strict=True))
        return term.apply(params, state, *whole, **extra)

    return Hint(term.init, apply)


def _used(term: Hint, params, state, seen, taught, extra) -> tuple[dict, dict]:
    """The student's and the teacher's outputs that the value depends on."""
    arguments = params, state, seen, taught, extra
    program = jax.make_jaxpr(lambda p, s, own, known, more: term.apply(p, s, own, known, **more)[0])(*arguments).jaxpr
    read = {id(v) for eqn in program.eqns for v in eqn.invars}
    flags = jax.tree.unflatten(jax.tree.structure(arguments), [id(v) in read for v in program.invars])
    pairs = ((seen, flags[2]), (taught, flags[3]))
    return tuple({name: x for name, x in found.items() if flag[name]} for found, flag in pairs)


def _alone(term: Hint, params, state, seen, taught, extra) -> Program:
    rng = np.random.default_rng(0)
    seen = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), seen)

    def value(params, seen, state, taught, extra):
        return term.apply(params, state, seen, taught, **extra)

    return compiled(jax.value_and_grad(value, (0, 1), has_aux=True), params, seen, state, taught, extra)


def kinds(config) -> dict[str, Any]:
    """Arm -> its loss and hint in words: `kd`, `hint review`, `nkd + hint vitkd`, or `labels`."""
    words = {}
    for name, student in config.students.items():
        found = [student.loss] * bool(student.loss) + [f"hint {student.hint}"] * bool(student.hint)
        words[name] = " + ".join(found) or "labels"
    return words
