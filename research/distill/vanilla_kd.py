"""VanillaKD: plain distillation of logits at scale, several students sharing each teacher forward.

Source: "Revisit the Power of Vanilla Knowledge Distillation", arXiv 2305.15781. Per step the batch is mixed once
(mixup, cutmix), the teachers run once in eval mode, and every arm of `config.students` computes

    label_weight * L_label(z_s, y_mix) + loss_weight * L(z_s, z_t, y_mix) + hint_weight * L_hint

with its own model, optimiser and loss. Teachers and students see the same mixed image, each with its own normalisation
(the published runs fed the teacher with the student's). Arms of equal model and options start from equal weights. An
arm without `loss` and `hint` is plain supervised training, and so the teacher of a small study is trained here too.
Losses of two views (MLLD) see a second, strongly augmented one, `augment.strong`. With stored labels no teacher runs:
batches bring its logits, and images that are mixed already (research.distill.stored).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.backbones import classify, teachers
from research.core import cost, optim
from research.core import experiment as engine
from research.core import metrics as metrics_lib
from research.core.staged import staged
from research.data import mixup
from research.distill import arms as arms_lib
from research.distill import stored, text_targets
from research.distill.arms import optimizer
from research.distill.multilevel import Views


def experiment(config, labels: Callable[[], np.ndarray] | None = None) -> engine.Experiment:
    """The Experiment of a resolved config (`data.num_classes`, `data.num_examples`, `steps`, `steps_per_epoch` known).

    Metrics: `loss` (all arms), `<arm>/loss`, and of the evaluation `<arm>/top1`, `top5`, `loss`, `ece`, `agreement`
    (with the teachers' class), the same of every teacher and, of several, of their mean, `teachers`. Where options of a
    student change on the way (`stages`), `stage` counts how often they did.

    Args:
      config: see configs.common and configs.distill.
      labels: gives the class of every training example, which CRD needs to draw negatives of other classes.
    Raises:
      UserError: `teacher.text` of other data.
      ValueError: a teacher without weights, a distillation loss without a teacher, unknown losses or models, two views
        without `augment.strong` or with mixing, stages that do not ascend or of options that are not there.
    """
    earlier = [(end, _experiment(changed, labels)) for end, changed in arms_lib.stages(config)]
    return staged(_experiment(config, labels), earlier)


def _experiment(config, labels) -> engine.Experiment:
    """`experiment` of students whose options stay."""
    networks, form, classes = teachers.networks(config), stored.form_of(config), config.data.num_classes
    arms = {name: arms_lib.arm(student, config, labels, networks) for name, student in config.students.items()}
    # Text rows stay on the host until `weights`: in `frozen` they are placed, and left out of checkpoints.
    text = text_targets.load(config.teacher.text, config.data.num_examples) if config.teacher.get("text") else None
    _check(config, arms, bool(networks or form), text is not None)
    optimizers, rates = {}, {}
    for name, student in config.students.items():
        optimizers[name], rates[name] = optimizer(config, student)
    apart = arms_lib.needs_parts(config)

    def init_arm(name, key):
        width = 0 if text is None else text.embeddings.shape[1]
        if form and arms[name].hint and not width:
            return stored.init_hint(arms[name], key, classes, f"students.{name}.hint={config.students[name].hint}")
        return arms_lib.init_hint(arms[name], networks, width, key)

    def init(key):
        params, state = {}, {}
        for name, arm in arms.items():
            # All arms draw from one key: equal models start equal.
            own, model_state = arm.network.init(key)
            adaptor, adaptor_state = init_arm(name, key)
            params[name] = {"model": own, "adaptor": adaptor}
            state[name] = {"model": model_state, "adaptor": adaptor_state}
        return params, state

    def frozen(key):
        found = teachers.frozen(networks, key)
        if text is not None:
            found["text"] = {name: jnp.zeros(x.shape, x.dtype) for name, x in text._asdict().items()}
        return found

    def weights():
        found = {"frozen": teachers.weights(config, networks)}
        if text is not None:
            found["frozen"]["text"] = text._asdict()
        for name, student in config.students.items():
            if student.weights:
                params, model_state = teachers.pretrained(student, arms[name].network, classes, new=True)
                new = {"params": {name: {"model": params}}, "model_state": {name: {"model": model_state}}}
                for part in (found, *(found.setdefault("ema", {}).setdefault(f"ema{d}", {}) for d in config.ema)):
                    for field, value in new.items():
                        part.setdefault(field, {}).update(value)
        return found

    def seen(fixed, batch, images):
        """(logits of all teachers (K, B, C) or None, the first one's endpoints) of the step's images."""
        known, taught = teachers.apply(networks, fixed, images) if networks else (None, {})
        if form:
            logits = stored.known(batch, classes, form=form)
            known, taught = logits[None], {"logits": logits}
        if text is not None:
            # A mixed image keeps the text of its own position, as in the published runs.
            row = fixed["text"]["rows"][batch["index"]]
            taught["text"] = fixed["text"]["embeddings"][row].astype(jnp.float32)
        return known, taught

    def loss(params, model_state, batch, context):
        mix_key, hint_key, key = jax.random.split(context.key, 3)
        # One mixing for all arms, and one target for each of their smoothings.
        smoothings = tuple({arm.smoothing: None for arm in arms.values()})
        images = classify.unit(batch["image"])
        if form:
            mixed = [stored.targets(batch, classes, smoothing) for smoothing in smoothings]
        else:
            images, mixed = mixup.mix(mix_key, images, batch["label"], smoothing=smoothings, **_mix(config))
        targets = dict(zip(smoothings, mixed, strict=True))
        fixed = context.frozen
        known, taught = seen(fixed, batch, images)
        strong = strongly = None
        if any(arm.views for arm in arms.values()):
            strong = classify.unit(batch["strong"])
            strongly = teachers.combined(teachers.apply(networks, fixed, strong)[0])
        epoch = (context.step // config.steps_per_epoch).astype(jnp.float32)
        parts, new, metrics = dict.fromkeys(arms_lib.PARTS, 0.0), {}, {}
        for name, arm in arms.items():
            y, values = targets[arm.smoothing], arm.values(epoch)
            own, old = params[name], model_state[name]
            logits, endpoints, state = arm.network.apply(own["model"], old["model"], images, train=True, key=key)
            task, kd, adaptor = values["label_weight"] * arm.label_loss(logits, y), 0.0, old["adaptor"]
            if arm.loss:
                student, teacher = logits, known if arm.several else teachers.combined(known)
                if arm.views:
                    second, _, state = arm.network.apply(own["model"], state, strong, train=True, key=key)
                    student, teacher = Views(logits, second), Views(teacher, strongly)
                value = arm.loss(student, teacher, y, **values[arms_lib.OPTIONS])
                kd = kd + values["loss_weight"] * value
            if arm.hint:
                for entry, take in arm.inherit.items():
                    adaptor = {**adaptor, entry: take(fixed[teachers.TEACHER]["params"])}
                extra = {"labels": y, "index": batch["index"], "key": hint_key, "epoch": epoch}
                hinted, adaptor = arm.hint.apply(
                    own["adaptor"], adaptor, {**endpoints, "logits": logits}, taught, **extra
                )
                kd = kd + values["hint_weight"] * hinted
            new[name] = {"model": state, "adaptor": adaptor}
            metrics[f"{name}/loss"] = engine.scalar(task + kd)
            parts = {"task": parts["task"] + task, "kd": parts["kd"] + kd}
        total = parts["task"] + parts["kd"]
        return parts if apart else total, engine.Output(new, metrics | {"loss": engine.scalar(total)})

    def evaluate(params, model_state, batch, fixed):
        images, metrics, known = classify.unit(batch["image"]), {}, None
        if networks:
            logits, _ = teachers.apply(networks, fixed, images)
            known = teachers.combined(logits)
            scored = dict(zip(networks, logits, strict=True)) | ({"teachers": known} if len(networks) > 1 else {})
            for name, found in scored.items():
                metrics |= _named(name, classify.accuracy(found, batch["label"], batch["mask"]))
        for name, arm in arms.items():
            logits, _, _ = arm.network.apply(params[name]["model"], model_state[name]["model"], images)
            metrics |= _named(name, classify.accuracy(logits, batch["label"], batch["mask"]))
            if known is not None:
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
        found = {name: network.cost() | {"frozen": True} for name, network in networks.items()}
        for name, arm in arms.items():
            adaptor, _ = jax.eval_shape(lambda key, name=name: init_arm(name, key), jax.random.PRNGKey(0))
            found[name] = arm.network.cost() | {"extra_params": cost.params_count(adaptor)}
        return found

    made = engine.supervised(
        init,
        loss,
        evaluate,
        arms_lib.by_parts(config, optimizers) if apart else optim.by_name(optimizers),
        parts=arms_lib.PARTS if apart else (),
        frozen=frozen,
        weights=weights,
        schedule=rates,
        accumulate=config.parallel.accumulate,
        ema=tuple(config.ema),
    )
    return made._replace(export=export, costs=costs)


def _check(config, arms, taught: bool, text: bool) -> None:
    if not arms:
        raise ValueError("students: no arm to train; add one, such as config.students.kd")
    needy = [name for name, arm in arms.items() if arm.loss or (arm.hint and not text)]
    if needy and not taught:
        raise ValueError(f"students.{needy[0]} distils without a teacher: set teacher.model, or loss and hint to ''")
    if views := [name for name, arm in arms.items() if arm.views]:
        loss = config.students[views[0]].loss
        if config.teacher.get("labels"):
            raise ValueError(f"students.{views[0]}: {loss!r} compares two views, teacher.labels stores labels of one")
        if not config.augment.get("strong"):
            raise ValueError(f"students.{views[0]}: {loss!r} compares two views; set augment.strong, e.g. rand-m10-n2")
        if config.mix.mixup or config.mix.cutmix:
            raise ValueError(
                f"students.{views[0]}: {loss!r} compares views of unmixed images; set mix.mixup and cutmix to 0"
            )


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
