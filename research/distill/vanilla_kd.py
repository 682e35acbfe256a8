"""VanillaKD: plain distillation of logits at scale, several students sharing each teacher forward.

Source: "Revisit the Power of Vanilla Knowledge Distillation", arXiv 2305.15781. Per step the batch is mixed once
(mixup, cutmix), the teacher runs once in eval mode, and every arm of `config.students` computes

    label_weight * L_label(z_s, y_mix) + loss_weight * L(z_s, z_t, y_mix) + hint_weight * L_hint

with its own model, optimiser and loss. Teacher and students see the same mixed image, each with its own normalisation
(the published runs fed the teacher with the student's). Arms of equal model and options start from equal weights. An
arm without `loss` and `hint` is plain supervised training, and so the teacher of a small study is trained here too.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.backbones import classify
from research.core import experiment as engine
from research.core import metrics as metrics_lib
from research.core import optim, schedules, scope, sharding
from research.data import mixup
from research.distill import hints, losses, text_targets
from research.port import checkpoint

TEACHER = "teacher"
RANDOM = "random"  # as teacher.weights: an untrained teacher, to try the plumbing


class Arm(NamedTuple):
    """One student: its network, its losses and its weights in the sum.

    Attributes:
      label_loss, loss: (logits..., targets) -> scalar mean; None without.
      hint: a hint method, or None.
      smoothing: label smoothing of the mixed targets.
    """

    network: classify.Network
    label_loss: Callable
    loss: Callable | None
    hint: hints.Hint | None
    label_weight: float
    loss_weight: float
    hint_weight: float
    smoothing: float


def _mean(function: Callable, relational: bool, group: int | None) -> Callable:
    """The scalar form of a loss: a mean over examples, or over groups where examples are related to each other."""
    if relational:
        return lambda *arrays: scope.by_group(function, group, *arrays)
    return lambda *arrays: jnp.mean(function(*arrays))


def _arm(student: Mapping, config, labels: Callable[[], np.ndarray] | None) -> Arm:
    group = student.group or None
    network = classify.network(
        student.model, config.data.num_classes, config.augment.size, dtype=student.dtype, **student.options
    )
    label = losses.pick(losses.LABEL_LOSSES, student.label_loss)
    loss = hint = None
    if student.loss:
        function = functools.partial(losses.pick(losses.LOSSES, student.loss), **student.loss_options)
        loss = _mean(function, student.loss in losses.RELATIONAL, group)
    if student.hint:
        options = dict(student.hint_options)
        if student.hint == "crd":
            options |= {"num_examples": config.data.num_examples, "classes": labels() if labels else None}
        builder = losses.pick(losses.HINTS, student.hint)
        if group and "group" in inspect.signature(builder).parameters:  # the others look at examples one by one
            options["group"] = group
        hint = builder(**options)
    return Arm(
        network,
        _mean(label, False, None),
        loss,
        hint,
        student.label_weight,
        student.loss_weight,
        student.hint_weight,
        student.smoothing,
    )


def optimizer(config, student: Mapping):
    """(gradient transformation, schedule) of one arm: the config's sections with the arm's own values over them."""
    options = {**config.optimizer, **student.optimizer}
    extra, lr = dict(options.pop("options")), options.pop("lr")
    schedule = schedules.schedule(lr=lr, steps=config.steps, steps_per_epoch=config.steps_per_epoch, **config.schedule)
    return optim.optimizer(lr=schedule, **options, **extra), schedule


def experiment(config, labels: Callable[[], np.ndarray] | None = None) -> engine.Experiment:
    """The Experiment of a resolved config (`data.num_classes`, `data.num_examples`, `steps`, `steps_per_epoch` known).

    Metrics: `loss` (all arms), `<arm>/loss`, and of the evaluation `<arm>/top1`, `top5`, `loss`, `agreement` (with the
    teacher's class), and `teacher/top1`, `top5`, `loss`.

    Args:
      config: see configs.common and configs.distill.
      labels: gives the class of every training example, which CRD needs to draw negatives of other classes.
    Raises:
      UserError: `teacher.text` of other data.
      ValueError: a teacher without weights, a distillation loss without a teacher, unknown losses or models.
    """
    arms = {name: _arm(student, config, labels) for name, student in config.students.items()}
    teacher = _teacher(config)
    # Text rows stay on the host until `weights`: in `frozen` they are placed, and left out of checkpoints.
    text = text_targets.load(config.teacher.text, config.data.num_examples) if config.teacher.get("text") else None
    if not arms:
        raise ValueError("students: no arm to train; add one, such as config.students.kd")
    needy = [name for name, arm in arms.items() if arm.loss or (arm.hint and text is None)]
    if needy and teacher is None:
        raise ValueError(f"students.{needy[0]} distils without a teacher: set teacher.model, or loss and hint to ''")
    optimizers, rates = {}, {}
    for name, student in config.students.items():
        optimizers[name], rates[name] = optimizer(config, student)

    def init(key):
        params, state = {}, {}
        for name, arm in arms.items():
            # All arms draw from one key: equal models start equal.
            own, model_state = arm.network.init(key)
            adaptor, adaptor_state = _init_hint(arm, teacher, text, key)
            params[name] = {"model": own, "adaptor": adaptor}
            state[name] = {"model": model_state, "adaptor": adaptor_state}
        return params, state

    def frozen(key):
        found = {}
        if teacher is not None:
            params, model_state = teacher.init(key)
            found |= {"params": _cast(params, teacher.module.dtype), "model_state": model_state}
        if text is not None:
            found["text"] = {name: jnp.zeros(x.shape, x.dtype) for name, x in text._asdict().items()}
        return found

    def weights():
        found = {}
        if teacher is not None and config.teacher.weights != RANDOM:
            params, model_state = _pretrained(config.teacher, teacher, config.data.num_classes)
            found["frozen"] = {"params": params, "model_state": model_state}
        if text is not None:
            found.setdefault("frozen", {})["text"] = text._asdict()
        for name, student in config.students.items():
            if student.weights:
                params, model_state = _pretrained(student, arms[name].network, config.data.num_classes)
                new = {"params": {name: {"model": params}}, "model_state": {name: {"model": model_state}}}
                for part in (found, *(found.setdefault("ema", {}).setdefault(f"ema{d}", {}) for d in config.ema)):
                    for field, value in new.items():
                        part.setdefault(field, {}).update(value)
        return found

    def loss(params, model_state, batch, context):
        mix_key, hint_key, key = jax.random.split(context.key, 3)
        # One mixing for all arms, and one target for each of their smoothings.
        smoothings = tuple({arm.smoothing: None for arm in arms.values()})
        images = classify.unit(batch["image"])
        images, mixed = mixup.mix(mix_key, images, batch["label"], smoothing=smoothings, **_mix(config))
        targets = dict(zip(smoothings, mixed, strict=True))
        known, taught, fixed = None, {}, context.frozen
        if teacher is not None:
            known, taught, _ = teacher.apply(fixed["params"], fixed["model_state"], images)
            known, taught = jax.lax.stop_gradient((known, {**taught, "logits": known}))
        if text is not None:
            # A mixed image keeps the text of its own position, as in the published runs.
            row = fixed["text"]["rows"][batch["index"]]
            taught["text"] = fixed["text"]["embeddings"][row].astype(jnp.float32)
        total, new, metrics = 0.0, {}, {}
        for name, arm in arms.items():
            y = targets[arm.smoothing]
            own, old = params[name], model_state[name]
            logits, endpoints, state = arm.network.apply(own["model"], old["model"], images, train=True, key=key)
            value = arm.label_weight * arm.label_loss(logits, y)
            adaptor = old["adaptor"]
            if arm.loss:
                value = value + arm.loss_weight * arm.loss(logits, known, y)
            if arm.hint:
                epoch = (context.step // config.steps_per_epoch).astype(jnp.float32)
                extra = {"labels": y, "index": batch["index"], "key": hint_key, "epoch": epoch}
                seen = {**endpoints, "logits": logits}
                hinted, adaptor = arm.hint.apply(own["adaptor"], old["adaptor"], seen, taught, **extra)
                value = value + arm.hint_weight * hinted
            new[name] = {"model": state, "adaptor": adaptor}
            metrics[f"{name}/loss"] = engine.scalar(value)
            total = total + value
        return total, engine.Output(new, metrics | {"loss": engine.scalar(total)})

    def evaluate(params, model_state, batch, fixed):
        images, metrics = classify.unit(batch["image"]), {}
        if teacher is not None:
            known, _, _ = teacher.apply(fixed["params"], fixed["model_state"], images)
            metrics |= _named(TEACHER, classify.accuracy(known, batch["label"], batch["mask"]))
        for name, arm in arms.items():
            logits, _, _ = arm.network.apply(params[name]["model"], model_state[name]["model"], images)
            metrics |= _named(name, classify.accuracy(logits, batch["label"], batch["mask"]))
            if teacher is not None:
                same = jnp.argmax(logits, -1) == jnp.argmax(known, -1)
                metrics[f"{name}/agreement"] = metrics_lib.mean(same, batch["mask"])
        return metrics

    def export(state):
        averages = {"": {"params": state.params, "model_state": state.model_state}, **state.ema}
        models = {}
        for average, found in averages.items():
            for name in arms:
                params, model_state = (found[part][name]["model"] for part in ("params", "model_state"))
                models[f"{name}_{average}".rstrip("_")] = {"params": params, **model_state}
        return models

    def costs():
        networks = {name: arm.network for name, arm in arms.items()} | ({TEACHER: teacher} if teacher else {})
        return {name: net.cost() for name, net in networks.items()}

    made = engine.supervised(
        init,
        loss,
        evaluate,
        optim.by_name(optimizers),
        frozen=frozen,
        weights=weights,
        schedule=rates,
        accumulate=config.parallel.accumulate,
        ema=tuple(config.ema),
    )
    return made._replace(export=export, costs=costs)


def _teacher(config) -> classify.Network | None:
    if not config.teacher.model:
        return None
    t = config.teacher
    return classify.network(t.model, config.data.num_classes, config.augment.size, dtype=t.dtype, **t.options)


def _pretrained(part: Mapping, network: classify.Network, num_classes: int):
    """(params, model_state) from the checkpoint that a teacher's or student's section names."""
    if checkpoint.is_own(part.weights):
        variables = checkpoint.load_variables(part.weights)
    else:
        variables = checkpoint.load_official(part.model, part.weights, num_classes=num_classes, image_size=network.size)
    wanted = jax.eval_shape(lambda key: network.module.init(key, network.example()), jax.random.PRNGKey(0))
    names = [{path for path, _ in sharding.paths(dict(tree))} for tree in (variables, wanted)]
    if names[0] != names[1]:
        wrong = sorted(names[0] ^ names[1])[0]
        raise ValueError(f"{part.weights} holds another network than {part.model}: {wrong} is in one of them only")
    return variables.pop("params"), variables


def _init_hint(arm: Arm, teacher: classify.Network | None, text: text_targets.Targets | None, key):
    """(adaptor parameters, adaptor state) for the endpoints the two networks have; both empty without a hint."""
    if arm.hint is None:
        return {}, {}

    def endpoints(network):
        images = jax.ShapeDtypeStruct((2, network.size, network.size, 3), jnp.float32)
        logits, found, _ = jax.eval_shape(lambda images: network.apply(*network.init(key), images), images)
        return {**found, "logits": logits}

    taught = endpoints(teacher) if teacher is not None else {}
    if text is not None:
        taught["text"] = jax.ShapeDtypeStruct((2, text.embeddings.shape[1]), jnp.float32)
    return arm.hint.init(key, endpoints(arm.network), taught)


def _cast(params, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), params)


def _named(prefix: str, metrics: engine.Metrics) -> engine.Metrics:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}


def _mix(config) -> dict:
    m = config.mix
    return {
        "num_classes": config.data.num_classes,
        "mixup_alpha": m.mixup,
        "cutmix_alpha": m.cutmix,
        "prob": m.prob,
        "switch_prob": m.switch_prob,
        "group": m.group or None,
    }
