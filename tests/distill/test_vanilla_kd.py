"""The VanillaKD experiment: arms share what they should, and every config trains two steps."""

import pathlib

import jax
import numpy as np
import pytest

from configs.distill import imagenet
from launch import train
from research.core import config as configs
from research.core import optim, writers
from research.distill import vanilla_kd

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_device")
CONFIGS = sorted(p for p in (ROOT / "configs" / "distill").glob("*.py") if "def get_config" in p.read_text())
# The ImageNet configs differ in student and recipe. Between them the smoke runs cover every student, both recipes, all
# teachers and all arms, each arm once where it compiles soonest; a config not listed trains its own default arms.
ARGUMENTS = {
    "vanilla_kd_r50_a1": "arms=bkd,teacher=resnet152,smoke",
    "vanilla_kd_r50_a2": "arms=review,teacher=resnet152,smoke",
    "vanilla_kd_vit_s_a1": "arms=crd,smoke",
    "vanilla_kd_vit_s_a2": "teacher=beitv2_large,smoke",
    "vanilla_kd_vit_ti_a1": "arms=kd+cc,smoke",
    "vanilla_kd_vit_ti_a2": "arms=rkd,smoke",
    "gpt4image_convnext_t": "arms=text,smoke",
    "gpt4image_deit_b": "arms=text,smoke",
    "cifar_compare": "pair=resnet20-vit,arms=fitnet+sp+ofa,smoke",
    "ofa_cifar_cnn": "pair=mixer_b-mobilenetv2,smoke",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_trains_two_steps(path, tmp_path):
    argument = ARGUMENTS.get(path.stem, "smoke")
    train.run(configs.load(f"{path}:{argument}"), tmp_path)
    rows = writers.read_rows(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert all(value is not None for row in rows for value in row.values())
    assert rows[-1]["kind"] == "done"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_says_how_to_run_it(path):
    text = path.read_text().split('"""')[1]
    for word in ("Command:", "Hardware:", "Published:", "python -m launch", path.stem):
        assert word in text, f"{path.name}: its docstring lacks {word!r}"


@pytest.mark.parametrize("recipe, epochs, decay, mixup", [("a1", 600, 0.01, 0.2), ("a2", 300, 0.02, 0.1)])
def test_recipes_are_the_published_ones(recipe, epochs, decay, mixup):
    c = imagenet.config("", "resnet50", recipe, bn_group=256)
    assert (c.epochs, c.optimizer.weight_decay, c.mix.mixup, c.mix.cutmix) == (epochs, decay, mixup, 1.0)
    assert (c.batch_size, c.optimizer.name, c.optimizer.lr, c.data.repeats) == (2048, "lamb", 5e-3, 3)
    assert (c.augment.auto, c.eval.crop, c.mix.group) == ("rand-m7-mstd0.5", 0.95, 256)
    kd = c.students.kd
    assert (kd.label_loss, kd.label_weight, kd.loss_weight, kd.smoothing) == ("bce", 1.0, 1.0, 0.1 * (recipe == "a1"))
    assert kd.loss_options.temperature == 1.0 and kd.options.drop_path == 0.05


def small(**changes):
    """A resolved two-arm config on digits, with an untrained teacher."""
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    c = configs.load(str(ROOT / "configs/distill/digits.py:smoke"), ["--config.teacher.weights=random", *overrides])
    data = train.open_data(c)
    return train.resolve(c, data), data


@pytest.fixture(scope="module")
def stepped():
    """State after one step from the start, and the start, of the arms none, kd, dkd, dist."""
    c, data = small()
    experiment = train.build(c, data)
    bound = train.runner.build(experiment, devices=jax.devices()[:1])
    state = bound.init(jax.random.PRNGKey(0))
    start = jax.device_get(state)
    state, metrics = bound.train_step(state, bound.put(next(train.batches(c, data)[0](0))))
    return start, jax.device_get(state), jax.device_get(metrics)


def test_arms_of_one_model_start_equal_and_part(stepped):
    start, after, _ = stepped
    for name in ("kd", "dkd", "dist"):
        jax.tree.map(np.testing.assert_array_equal, start.params[name], start.params["none"])
        moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), after.params[name], after.params["none"])
        assert max(jax.tree.leaves(moved)) > 1e-5


def test_teacher_is_frozen_and_in_eval_mode(stepped):
    start, after, _ = stepped
    jax.tree.map(np.testing.assert_array_equal, start.frozen, after.frozen)


def test_total_is_the_sum_of_the_arms(stepped):
    metrics = {name: total / count for name, (total, count) in stepped[2].items()}
    arms = sum(metrics[f"{name}/loss"] for name in ("none", "kd", "dkd", "dist"))
    np.testing.assert_allclose(metrics["loss"], arms, rtol=1e-6)


def test_an_arm_trains_the_same_alone_and_in_company(stepped):
    """Sharing the teacher's forward changes nothing: the arm's parameters do not depend on the others."""
    c, data = small()
    with c.unlocked():
        for name in ("none", "dkd", "dist"):
            del c.students[name]
    bound = train.runner.build(train.build(c, data), devices=jax.devices()[:1])
    state = bound.init(jax.random.PRNGKey(0))
    state, _ = bound.train_step(state, bound.put(next(train.batches(c, data)[0](0))))
    for a, b in zip(jax.tree.leaves(state.params["kd"]), jax.tree.leaves(stepped[1].params["kd"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_optimisers_by_name_are_independent():
    """Each arm's clipping sees its own gradient alone."""
    params = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    both = optim.by_name({name: optim.optimizer("sgd", 1.0, clip=1.0, momentum=0.0) for name in params})
    grads = {"a": np.full(3, 1e3, np.float32), "b": np.full(3, 0.1, np.float32)}
    updates, _ = both.update(grads, both.init(params), params)
    np.testing.assert_allclose(np.linalg.norm(updates["a"]), 1.0, rtol=1e-5)
    np.testing.assert_allclose(updates["b"], -0.1, rtol=1e-5)


def test_an_arm_may_have_its_own_rate():
    c, _ = small()
    with c.unlocked():
        c.students.kd.optimizer.lr = 0.125
    rates = {name: float(vanilla_kd.optimizer(c, student)[1](0)) for name, student in c.students.items()}
    assert rates == pytest.approx({"none": 2e-3, "kd": 0.125, "dkd": 2e-3, "dist": 2e-3})


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"students.kd.loss": "kdd"}, "did you mean 'kd'"),
        ({"students.kd.label_loss": "bcee"}, "did you mean 'bce'"),
        ({"teacher.model": ""}, "distils without a teacher: set teacher.model"),
    ],
)
def test_wrong_arms_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        train.build(*small(**changes))
