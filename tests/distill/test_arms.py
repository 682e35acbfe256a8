"""What an arm of a KD config may ask for beside a loss: schedules, two views, several teachers, two momenta."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from launch import train
from research.backbones import teachers
from research.core import config as configs
from research.core import metrics as metrics_lib
from research.distill import arms, dot

ROOT = pathlib.Path(__file__).parents[2]
SMALL = dict(channels=(4, 4, 8), stem_width=4)
RATE, DELTA = 0.1, 0.05
SGD = dict(name="sgd", lr=RATE, weight_decay=1e-2, clip=0.0)
STUDENTS = {
    "alone": dict(optimizer=SGD),
    "kd": dict(loss="kd", optimizer=SGD, loss_weight=2.0),
    "dot": dict(loss="kd", loss_weight=2.0, optimizer={**SGD, "name": "dot", "delta": DELTA}),
    "dot_hint": dict(hint="fitnet", optimizer={**SGD, "name": "dot"}),
    "mlld": dict(loss="mlld", label_weight=0.0),
    "meal": dict(loss="meal"),
    "srrl": dict(hint="srrl"),
    "ofd": dict(hint="ofd", hint_weight=1e-3),
    "ctkd": dict(hint="ctkd"),
    "late": dict(
        loss="kd",
        loss_options=dict(temperature=2.0),
        schedule=dict(loss_weight=((0, 0.0), (4, 1.0)), loss_options=dict(temperature=((0, 2.0), (4, 6.0)))),
    ),
}


def config(names=tuple(STUDENTS), **changes):
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    c = configs.load(str(ROOT / "configs/distill/digits.py:smoke"), ["--config.teacher.weights=random", *overrides])
    with c.unlocked():
        make = lambda given: common.student("resnet8", label_loss="ce", options=SMALL, **given)
        c.students = common.arms(**{name: make(STUDENTS[name]) for name in names})
        c.teacher.ensemble = common.arms(second=common.teacher("resnet8", options=SMALL))
        c.teacher.ensemble.second.weights = "random"
        c.augment.strong = changes.get("augment.strong", "rand-m5-n1")
        c.schedule.name = "constant"
    return c


@pytest.fixture(scope="module")
def run():
    """(the Runner, the start, the state after one step, its metrics, the batch)."""
    c = config()
    data = train.open_data(c)
    c = train.resolve(c, data)
    bound = train.runner.build(train.build(c, data), devices=jax.devices()[:1])
    batch = next(train.batches(c, data)[0](0))
    state = bound.init(jax.random.PRNGKey(0))
    start = jax.device_get(state)
    state, metrics = bound.train_step(state, bound.put(batch))
    return bound, start, jax.device_get(state), metrics_lib.finish(metrics), batch


def moved(run, name):
    return jax.tree.map(lambda a, b: a - b, run[2].params[name]["model"], run[1].params[name]["model"])


def close(a, b, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **{"rtol": 2e-3, "atol": 2e-6, **tolerance}), a, b)


def test_dot_begins_as_sgd_and_keeps_both_gradients_apart(run):
    """With empty buffers both take the same first step; then DOT's buffers are the two gradients."""
    close(moved(run, "dot"), moved(run, "kd"))
    state = run[2].opt_state["dot"]
    whole = jax.tree.map(lambda step: -step / RATE, moved(run, "dot"))
    close(jax.tree.map(jnp.add, state.task["model"], state.kd["model"]), whole, atol=1e-4)
    # The arm without a teacher has the same task: its step is that of the task's buffer.
    close(state.task["model"], jax.tree.map(lambda step: -step / RATE, moved(run, "alone")), atol=1e-4)
    assert optax_norm(state.kd["model"]) > 0.1


def optax_norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree))))


def test_dot_gives_adaptors_the_plain_momentum(run):
    """Nothing but the hint reaches them: the task's buffer stays empty, and weights decay with the hint's."""
    bound, _, _, _, batch = run
    state = bound.init(jax.random.PRNGKey(0))
    buffers = []
    for _ in range(2):
        before = jax.device_get(state.params["dot_hint"]["adaptor"])
        state, _ = bound.train_step(state, bound.put(batch))
        buffers.append(jax.device_get(state.opt_state["dot_hint"]))
    assert optax_norm(buffers[1].task["adaptor"]) == 0
    step = jax.tree.map(lambda a, b: a - b, jax.device_get(state.params["dot_hint"]["adaptor"]), before)
    close(step, jax.tree.map(lambda m: -RATE * m, buffers[1].kd["adaptor"]), atol=1e-5)


def test_dot_follows_its_equations_in_the_second_step():
    gradients = dot.Gradients({"w": jnp.asarray([1.0])}, {"w": jnp.asarray([2.0])})
    optimizer = dot.dot(RATE, momentum=0.9, delta=DELTA)
    params = {"w": jnp.zeros(1)}
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(gradients, state, params)
    assert float(updates["w"][0]) == pytest.approx(-RATE * (1 * (1 + 0.85) + 2 * (1 + 0.95)), rel=1e-6)


def test_two_views_reach_the_loss(run):
    """MLLD's loss holds both views' label terms; the arm's batch statistics saw both."""
    *_, metrics, batch = run
    assert batch["strong"].shape == batch["image"].shape and np.any(batch["strong"] != batch["image"])
    assert np.isfinite(metrics["mlld/loss"]) and optax_norm(moved(run, "mlld")) > 0
    stats = [run[2].model_state[name]["model"]["batch_stats"] for name in ("mlld", "alone")]
    assert optax_norm(jax.tree.map(lambda a, b: a - b, *stats)) > 0


def test_a_step_returns_what_it_takes(run):
    """Shapes, types and their weakness: a second step is not compiled anew."""
    bound, *_, batch = run
    state, _ = bound.train_step(bound.init(jax.random.PRNGKey(0)), bound.put(batch))
    bound.train_step(state, bound.put(batch))
    assert bound.train_step._cache_size() == 1


def test_hints_see_the_teachers_own_layers(run):
    """Not those that their state was made with."""
    found, teacher = run[2].model_state, run[2].frozen["teacher"]["params"]
    close(found["srrl"]["adaptor"]["classifier"], teacher["fc"], rtol=0, atol=0)
    norms = teachers.stage_norms(teacher)
    assert len(norms) == 3 and all(scale.ndim == 1 for scale, _ in norms)
    close([tuple(pair) for pair in found["ofd"]["adaptor"]["norms"]], norms, rtol=0, atol=0)


def test_a_scheduled_loss_starts_with_its_first_value(run):
    """Weight 0 in the first epoch: the arm trains as the one without a teacher."""
    assert run[3]["late/loss"] == pytest.approx(run[3]["alone/loss"], rel=1e-5)


def test_schedules_are_linear_between_their_points():
    c = config(("late",))
    values = arms._values(c.students.late)
    assert [float(values(jnp.float32(epoch))["loss_weight"]) for epoch in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    options = values(jnp.float32(2))["loss_options"]
    assert {name: float(value) for name, value in options.items()} == {"temperature": 4.0}


def test_several_teachers_are_scored_and_averaged(run):
    bound, _, state, _, batch = run
    found = metrics_lib.finish(bound.eval_step(bound.place(state), bound.put(batch)))
    assert {"teacher/top1", "teacher_second/top1", "teachers/top1", "meal/agreement", "kd/ece"} <= set(found)
    logits = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    mean = np.mean(jax.nn.softmax(logits), axis=0)
    np.testing.assert_allclose(jax.nn.softmax(teachers.combined(jnp.asarray(logits))), mean, rtol=1e-5)
    np.testing.assert_array_equal(teachers.combined(jnp.asarray(logits[:1])), logits[0])


@pytest.mark.parametrize(
    "names, changes, text",
    [
        (("mlld",), {"augment.strong": ""}, "set augment.strong"),
        (("mlld",), {"mix.mixup": 0.2}, "set mix.mixup and cutmix to 0"),
        (("dot",), {"students.dot.optimizer": "dict(name='dot', clip=1.0)"}, "clips no gradients"),
        (("kd",), {"students.kd.schedule": {"loss_wait": ((0, 1.0),)}}, "there are label_weight"),
        (("kd",), {"students.kd.schedule": {"loss_weight": ((1, 1.0), (0, 0.0))}}, "have to grow"),
    ],
)
def test_what_cannot_be_is_refused(names, changes, text):
    c = config(names, **{key: value for key, value in changes.items() if not key.startswith("students")})
    with c.unlocked():
        for key, value in changes.items():
            if key.startswith("students"):
                name, field = key.split(".")[1:]
                c.students[name][field] = configs.ConfigDict(
                    {**SGD, "name": "dot", "clip": 1.0} if field == "optimizer" else value
                )
    data = train.open_data(c)
    with pytest.raises(ValueError, match=text):
        train.build(train.resolve(c, data), data)
