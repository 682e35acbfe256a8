"""The recipes of BiMLP and of the small studies: they train, BiMLP's second step fits on the first, arms compare."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs.backbones import bimlp, small
from launch import train
from research import backbones
from research.core import config as configs
from research.core import writers

ROOT = pathlib.Path(__file__).parents[2] / "configs" / "backbones"

# One arm each of those that are alike to the compiler.
STUDIES = ("family=vanillanet,arms=series", "family=parameternet,arms=experts2", "family=bimlp,arms=sign")
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("config", ["bimlp.py:smoke", *(f"small.py:{study},smoke" for study in STUDIES)])
def test_a_config_trains_two_steps(config, tmp_path):
    train.run(configs.load(f"{ROOT}/{config}"), tmp_path)
    rows = writers.read_rows(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2] and rows[-1]["kind"] == "done"
    assert all(value is not None for row in rows for value in row.values())


def test_the_second_step_can_start_from_the_first():
    def shapes(step):
        student = bimlp.get_config(f"step={step},smoke").students.kd
        model = backbones.create(student.model, **student.options)
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))

    assert shapes(1) == shapes(2)


@pytest.mark.parametrize("family", small.FAMILIES)
def test_the_arms_of_a_small_study_differ_in_what_it_compares_alone(family):
    study = small.FAMILIES[family]
    students = small.get_config(f"family={family},arms={'+'.join(study.arms)}").students.to_dict()
    for name, changes in study.arms.items():
        assert {key: students[name]["options"].pop(key) for key in changes} == changes
    assert all(student == students[min(study.arms)] for student in students.values())


def test_the_steps_differ_in_weights_and_their_decay():
    first, second = (bimlp.get_config(f"variant=bimlp_m,step={step},activation=sign") for step in (1, 2))
    found = [(c.students.kd.options.weights, c.optimizer.weight_decay) for c in (first, second)]
    assert found == [("real", 0.05), ("xnor", 0.0)]
    assert second.students.kd.model == "bimlp_m" and second.students.kd.options.activation == "sign"
    assert (second.students.kd.loss, second.students.kd.label_weight, second.ema) == ("kd", 0.0, (0.99996,))
    with pytest.raises(ValueError, match="step: 3 is neither 1"):
        bimlp.get_config("step=3")
    with pytest.raises(ValueError, match="arms: no arm 'signs'"):
        small.get_config("family=bimlp,arms=real+signs")
    with pytest.raises(ValueError, match="family: no family 'bimpl'; there are vanillanet, parameternet, bimlp"):
        small.get_config("family=bimpl")


@pytest.mark.parametrize("name", ["bimlp", "small"])
def test_a_config_says_how_to_run_it(name):
    text = (ROOT / f"{name}.py").read_text().split('"""')[1]
    for word in ("Command:", "Hardware:", "Published:", f"configs/backbones/{name}.py"):
        assert word in text, f"its docstring lacks {word!r}"
