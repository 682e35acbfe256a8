"""Training on stored labels is online distillation on the same views: loss, gradient and any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from launch import train
from research.backbones import classify
from research.core import config as configs
from research.core import runner
from research.data import label_files, mixup, views
from research.distill import stored

SMALL = dict(layers=(1, 1, 1), channels=(4, 4, 4), stem_width=4)
SIZE, BATCH, CLASSES = 8, 16, 10
BOX, LAM = (1, 5, 2, 8), 1 - 24 / 64
MIXINGS = {"unmixed": None, "mixup": views.Mix(0, 0.5, None), "cutmix": views.Mix(0, LAM, BOX)}


def config(labels="", **teacher):
    c = common.smoke(common.base(), size=SIZE)
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size, c.data.num_classes, c.data.num_examples, c.steps_per_epoch = BATCH, CLASSES, 100, 2
    student = dict(model="resnet8", options=SMALL, label_loss="ce", smoothing=0.1)
    c.students = common.arms(
        kd=common.student(**student, loss="kd", loss_options=dict(temperature=4.0)),
        dist=common.student(**student, loss="dist"),
    )
    c.teacher = common.teacher("resnet8", options=SMALL)
    c.teacher.weights, c.teacher.labels = "random", labels
    c.teacher.update(teacher)
    return c


def started(c, count=1):
    c = configs.freeze(c)
    bound = runner.build(train.build(c, None), devices=jax.devices()[:count])
    return bound, bound.init(jax.random.PRNGKey(0))


@pytest.fixture(scope="module")
def teacher():
    """(the online experiment's runner and state without mixing, images -> its teacher's logits)."""
    bound, state = started(config())
    network = classify.network("resnet8", CLASSES, SIZE, **SMALL)
    frozen = jax.device_get(state.frozen["teacher"])
    apply = jax.jit(lambda images: network.apply(frozen["params"], frozen["model_state"], classify.unit(images))[0])
    return bound, state, apply


@pytest.fixture(scope="module")
def reinforced():
    return started(config("labels"))


def batch_of(mix):
    """(the online batch, the same as views mixed with the batch reversed): even pixels, so that means are exact."""
    rng = np.random.default_rng(0)
    images = 2 * rng.integers(0, 128, (BATCH, SIZE, SIZE, 3)).astype(np.uint8)
    label = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    plain = {"image": images, "label": label, "index": np.arange(BATCH, dtype=np.int32), "mask": np.ones(BATCH, "f4")}
    if mix is None:
        return plain, plain | {"partner": label, "lam": np.ones(BATCH, "f4")}
    mixed = np.stack([views.mixed(a, b, mix) for a, b in zip(images, images[::-1], strict=True)])
    return plain, plain | {"image": mixed, "partner": label[::-1], "lam": np.full(BATCH, mix.lam, "f4")}


def through_a_file(found):
    """Labels as they are after having been stored in float32."""
    made = {"form": "crops", "dtype": "float32", "top": CLASSES, "data": {"num_classes": CLASSES}}
    kind = label_files.layout(made)
    rows = np.zeros(BATCH, kind)
    for name in kind.names:
        rows[name] = found[name]
    rows = label_files.unpack(label_files.pack(0, rows, [b""] * BATCH), kind).labels
    return {f"known_{name}": rows[name] for name in kind.names}


def values(metrics):
    return {name: float(total / count) for name, (total, count) in jax.device_get(metrics).items()}


@pytest.mark.parametrize("name", MIXINGS)
def test_loss_and_gradient_are_those_of_the_teacher_running_beside(name, teacher, reinforced, monkeypatch):
    mix = MIXINGS[name]
    online, start, apply = teacher
    if mix is not None:  # the device mixes as the views are mixed
        weight = jnp.full((SIZE, SIZE), mix.lam, jnp.float32)
        if mix.box:
            weight = 1 - mixup._inside(mix.box, SIZE, SIZE).astype(jnp.float32)
        monkeypatch.setattr(mixup, "draw", lambda *_, **__: (weight, jnp.asarray(mix.lam, jnp.float32)))
        online = started(config())[0]
    plain, viewed = batch_of(mix)
    labels = through_a_file(jax.device_get(stored.label(apply(viewed["image"]), CLASSES)))
    bound, state = reinforced
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    _, expected = online.train_step(copy(start), online.put(plain))
    _, found = bound.train_step(copy(state), bound.put(viewed | labels))
    expected, found = values(expected), values(found)
    assert expected["kd/loss"] > 0 and expected["dist/loss"] > 0
    for key in ("loss", "kd/loss", "dist/loss", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=2e-5), key


def test_eight_devices_give_the_same_loss_as_one(reinforced):
    _, viewed = batch_of(MIXINGS["cutmix"])
    logits = np.random.default_rng(1).normal(size=(BATCH, CLASSES)).astype(np.float32)
    found = stored.label(jnp.asarray(logits), 3)
    batch = viewed | {f"known_{name}": np.asarray(value) for name, value in found.items()}
    results = []
    for bound, state in (reinforced, started(config("labels"), 8)):
        _, metrics = bound.train_step(jax.tree.map(jnp.copy, state), bound.put(batch))
        results.append(values(metrics))
    assert results[0]["loss"] > 0
    for key in ("loss", "kd/loss", "dist/loss", "grad_norm"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-4), key


def test_no_teacher_is_built(reinforced):
    bound, state = reinforced
    assert not jax.tree.leaves(state.frozen)
    experiment = train.build(configs.freeze(config("labels", model="no_such_model")), None)
    assert sorted(experiment.costs()) == ["dist", "kd"]


def test_the_teachers_logits_are_all_that_a_hint_may_see():
    c = config("labels")
    c.students.kd.hint, c.students.kd.hint_options = "discriminator", {"reduction": 2}
    assert jax.eval_shape(train.build(configs.freeze(c), None).init, jax.random.PRNGKey(0)).params["kd"]["adaptor"]
    c.students.kd.hint, c.students.kd.hint_options = "fitnet", {}
    with pytest.raises(ValueError, match="students.kd.hint=fitnet needs features of the teacher, but teacher.labels"):
        jax.eval_shape(train.build(configs.freeze(c), None).init, jax.random.PRNGKey(0))


def test_an_unknown_densify_is_refused():
    with pytest.raises(ValueError, match="teacher.densify='sharp': choose one of smooth, zeros, renormalize"):
        train.build(configs.freeze(config("labels", densify="sharp")), None)
