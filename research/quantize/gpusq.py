"""GPUSQ-ViT: a vision transformer is pruned to 2:4 and then rounded to 8 or 4 bits, each time taught by what it was.

Source: Yu et al. 2023, "Boost Vision Transformer with GPU-Friendly Sparsity and Quantization" (arXiv 2305.10727). Each
of the two stages is a run of this experiment, whose arms (`config.students`) start from their teacher's weights:

1. Pruning. The teacher is the dense network; masks come from its weights and stay. What is pruned is zero before the
   first step and after the last, as its gradients are.
2. Quantisation, aware of 8 or 4 bits of weights and of the inputs of all pruned layers, straight-through. The teacher
   is the sparse network of stage 1, `config.teacher.ensemble.sparse`.

Both minimise, with the published weights 1, 10 and 5,

    label_weight * cross-entropy + logit_weight * KL(teacher || student) + feature_weight * sum_j factor_j MSE_j

over outputs j of later blocks (`config.distill.features`), and only those images teach features on which the two
networks agree about the class. In stage 2 the factors make less of blocks that suffered more in stage 1.

There is no public code, and the equations could not be read: the weights, the agreement and the factors' direction are
as public notes on the paper report them. Ours are the factors' form (see `factors`), temperature 1, which blocks are
late, and the scales of inputs, one a token by its largest magnitude (TensorRT, by which the paper deploys, has one a
tensor). The patches' projection has few bits in its kernel alone: its inputs are images.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from research.backbones import classify, teachers
from research.core import experiment as engine
from research.core import metrics as metrics_lib
from research.core import optim, schedules, scope
from research.data import mixup
from research.layers.norm import accumulation_dtype
from research.quantize import reconstruction, rules, sparse_layers
from research.quantize.rules import Rule

DENSE, SPARSE = teachers.TEACHER, f"{teachers.TEACHER}_sparse"
BITS = (0, 8, 4)  # 0: real numbers
LABELS = ("true", "teacher")
WEIGHTS = {"label": "label_weight", "logits": "logit_weight", "features": "feature_weight"}


def feature_losses(student: Mapping, teacher: Mapping, names: Sequence[str]) -> jax.Array:
    """Mean squared differences of endpoints (B, N, C), (J, B); the teacher's are constants.

    Raises:
      ValueError: an endpoint that one of them lacks.
    """
    losses = []
    for name in names:
        if missing := [endpoints for endpoints in (student, teacher) if name not in endpoints]:
            raise ValueError(f"distill.features: no endpoint {name!r} but {', '.join(missing[0])}")
        s, t = (x.astype(accumulation_dtype(x)) for x in (student[name], jax.lax.stop_gradient(teacher[name])))
        losses.append(jnp.mean(jnp.square(s - t), axis=(1, 2)))
    return jnp.stack(losses)


def factors(losses: jax.Array) -> jax.Array:
    """Weights of feature losses in stage 2 by those (J, B) of stage 1: inverse to their means, 1 on average, (J,).

    What pruning could not restore is asked for less. All 1 where stage 1 lost nothing. The paper fixes them by the
    losses of its stage 1; these are the losses of that stage's network on the images at hand.
    """
    inverse = 1 / (scope.mean(jnp.mean(jax.lax.stop_gradient(losses), axis=1)) + 1e-12)
    return inverse / jnp.mean(inverse)


def distillation(
    student: Mapping, teacher: Mapping, names: Sequence[str], weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(divergence of logits, weighted sum of feature losses), scalars, means over the batch.

    Args:
      student, teacher: endpoints with `logits` (B, C).
      weights: of features, (J,); None for ones.
    """
    known = teacher["logits"]
    divergence = reconstruction.divergence(known, student["logits"])
    losses = feature_losses(student, teacher, names)
    agree = jnp.argmax(student["logits"], axis=-1) == jnp.argmax(known, axis=-1)
    means = jnp.mean(jnp.where(agree[None, :], losses, 0), axis=1)
    return divergence, jnp.sum(means if weights is None else means * weights.astype(means.dtype))


def forward(network: classify.Network, params: Mapping, masks: Mapping, bits: int | None, images: jax.Array, **options):
    """(endpoints with `logits`, model state) of a network whose layers are pruned and rounded.

    Args:
      masks, bits: see `sparse_layers.apply`; `bits` are also those of the dense layers' inputs, each token by its
        largest magnitude.
      **options: of `Network.apply`: `train`, `key`.
    """
    seen, chosen = sparse_layers.apply(params, masks, bits), ()
    if bits is not None:
        paths = "|".join(re.escape(layer) for layer in sparse_layers.layers(params))
        chosen = (Rule(f"^({paths})$", activation_bits=bits),)
    with rules.few_bits(chosen):
        found, endpoints, state = network.apply(seen, {}, images, **options)
    return {**endpoints, "logits": found}, state


def experiment(config, labels=None) -> engine.Experiment:
    """The Experiment of a resolved config; see configs/quantize/gpusq.py for its sections.

    Metrics: `<arm>/loss`, and its terms `label`, `logits` and `features` before they are weighted; of the evaluation
    `<arm>/top1`, `top5`, `loss`, `ece` and `agreement` with its teacher's class, the same of `<arm>_oneshot`, the
    teacher's weights pruned and rounded as the arm's and not trained, and of the teachers.

    Raises:
      ValueError: an arm without a teacher, bits or a pattern that are none, a network without layers for it.
    """
    del labels
    networks, options = teachers.networks(config), config.distill
    _check(config, networks)
    arms = config.students
    own = {
        name: classify.network(arm.model, config.data.num_classes, config.augment.size, dtype=arm.dtype, **arm.options)
        for name, arm in arms.items()
    }
    schedule, optimizer = _optimizer(config)
    aware = any(arm.aware for arm in arms.values())

    def start(params, arm):
        """(parameters, model state) of an arm that starts from these weights."""
        params, masks = sparse_layers.prune(params, arm.pattern) if arm.pattern else (params, {})
        return params, {"masks": masks}

    def init(key):
        return _apart({name: start(own[name].init(key)[0], arm) for name, arm in arms.items()})

    def frozen(key):
        return teachers.frozen(networks, key)

    def weights():
        known = teachers.weights(config, networks)
        begun = {name: start(known[arm.teacher]["params"], arm) for name, arm in arms.items() if arm.teacher in known}
        fields = dict(zip(("params", "model_state"), _apart(begun), strict=True))
        averages = {f"ema{decay}": fields for decay in config.ema}
        return {"frozen": known, **fields} | ({"ema": averages} if averages else {})

    def taught(fixed, images):
        """Endpoints of every teacher."""
        seen = {}
        for name, network in networks.items():
            found, endpoints, _ = network.apply(fixed[name]["params"], fixed[name]["model_state"], images)
            seen[name] = jax.lax.stop_gradient({**endpoints, "logits": found})
        return seen

    def loss(params, model_state, batch, context):
        mix_key, key = jax.random.split(context.key)
        images, target = mixup.mix(
            mix_key, classify.unit(batch["image"]), batch["label"], smoothing=options.smoothing, **_mix(config)
        )
        seen = taught(context.frozen, images)
        by_block = factors(feature_losses(seen[SPARSE], seen[DENSE], options.features)) if aware else None
        total, metrics = 0.0, {}
        for name, arm in arms.items():
            teacher, masks = seen[arm.teacher], model_state[name]["masks"]
            student, _ = forward(own[name], params[name], masks, arm.bits or None, images, train=True, key=key)
            found = student["logits"].astype(accumulation_dtype(student["logits"]))
            hard = target.astype(found.dtype)
            if options.labels == "teacher":
                hard = jax.nn.one_hot(jnp.argmax(teacher["logits"], axis=-1), found.shape[-1], dtype=found.dtype)
            terms = {"label": jnp.mean(optax.softmax_cross_entropy(found, hard))}
            terms["logits"], terms["features"] = distillation(
                student, teacher, options.features, by_block if arm.aware else None
            )
            scaled = [arm[WEIGHTS[term]] * value for term, value in terms.items()]
            metrics |= {f"{name}/{term}": engine.scalar(value) for term, value in terms.items()}
            metrics[f"{name}/loss"] = engine.scalar(sum(scaled))
            total = total + sum(scaled)
        return total, engine.Output(model_state, metrics | {"loss": engine.scalar(total)})

    def evaluate(params, model_state, batch, fixed):
        images, metrics = classify.unit(batch["image"]), {}
        seen = taught(fixed, images)
        scored = {name: (found["logits"], None) for name, found in seen.items()}
        for name, arm in arms.items():
            masks, known = model_state[name]["masks"], seen[arm.teacher]["logits"]
            forms = {name: params[name]}
            if arm.pattern or arm.bits:
                given = fixed[arm.teacher]["params"]
                forms[f"{name}_oneshot"] = jax.tree.map(lambda x, like: x.astype(like.dtype), given, params[name])
            for form, of in forms.items():
                scored[form] = forward(own[name], of, masks, arm.bits or None, images)[0]["logits"], known
        for name, (found, known) in scored.items():
            own_metrics = classify.accuracy(found, batch["label"], batch["mask"])
            if known is not None:
                same = jnp.argmax(found, axis=-1) == jnp.argmax(known, axis=-1)
                own_metrics["agreement"] = metrics_lib.mean(same, batch["mask"])
            metrics |= {f"{name}/{metric}": value for metric, value in own_metrics.items()}
        return metrics

    def export(state):
        found = {name: {"params": params} for name, params in state.params.items()}
        for average, kept in state.ema.items():
            found |= {f"{name}_{average}": {"params": params} for name, params in kept["params"].items()}
        return found

    def costs():
        found = {name: network.cost() | {"frozen": True} for name, network in networks.items()}
        for name, arm in arms.items():
            shapes = jax.eval_shape(own[name].init, jax.random.PRNGKey(0))[0]
            found[name] = own[name].cost() | sparse_layers.stored_bytes(shapes, arm.pattern or None, arm.bits or None)
        return found

    made = engine.supervised(
        init,
        loss,
        evaluate,
        optim.by_name(dict.fromkeys(arms, optimizer)),
        frozen=frozen,
        weights=weights,
        schedule=schedule,
        accumulate=config.parallel.accumulate,
        ema=tuple(config.ema),
    )
    return made._replace(export=export, costs=costs)


def _apart(found: Mapping[str, tuple]) -> tuple[dict, dict]:
    """Two dicts of a dict of pairs."""
    return {name: first for name, (first, _) in found.items()}, {name: second for name, (_, second) in found.items()}


def _optimizer(config):
    """(schedule, gradient transformation) of every arm."""
    options = dict(config.optimizer)
    extra, lr = dict(options.pop("options")), options.pop("lr")
    schedule = schedules.schedule(lr=lr, steps=config.steps, steps_per_epoch=config.steps_per_epoch, **config.schedule)
    return schedule, optim.optimizer(lr=schedule, **options, **extra)


def _mix(config) -> dict:
    m = config.mix
    alphas = {"mixup_alpha": m.mixup, "cutmix_alpha": m.cutmix, "prob": m.prob, "switch_prob": m.switch_prob}
    return {"num_classes": config.data.num_classes, "group": m.group or None, **alphas}


def _check(config, networks: teachers.Networks) -> None:
    if config.distill.labels not in LABELS:
        raise ValueError(f"distill.labels: {config.distill.labels!r} is none of {', '.join(LABELS)}")
    for name, arm in config.students.items():
        if arm.teacher not in networks:
            raise ValueError(
                f"students.{name}.teacher: there is no {arm.teacher!r} but {', '.join(networks) or 'no teacher'}; "
                f"{SPARSE!r} is teacher.ensemble.sparse"
            )
        if arm.bits not in BITS:
            raise ValueError(f"students.{name}.bits: {arm.bits!r} is none of {', '.join(map(str, BITS))}")
        if arm.pattern and arm.pattern not in sparse_layers.PATTERNS:
            raise ValueError(
                f"students.{name}.pattern: {arm.pattern!r} is none of {', '.join(sparse_layers.PATTERNS)}, nor empty"
            )
        if arm.aware and not {DENSE, SPARSE} <= set(networks):
            raise ValueError(f"students.{name}.aware: what pruning lost is seen by teacher and teacher.ensemble.sparse")
