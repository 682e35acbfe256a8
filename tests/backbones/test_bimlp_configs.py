"""The recipes of BiMLP: they train, the second step fits on the first, and the small study's arms compare."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs.backbones import bimlp, bimlp_small
from launch import train
from research import backbones
from research.core import config as configs
from research.core import writers

ROOT = pathlib.Path(__file__).parents[2] / "configs" / "backbones"
EVERY = "arms=" + "+".join(bimlp_small.QUANTISERS)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The runs are about the configs: compiling for one device takes less time than for eight."""
    bind = train.runner.build
    monkeypatch.setattr(train.runner, "build", lambda e, **o: bind(e, **{"devices": jax.devices()[:1], **o}))


@pytest.mark.parametrize("config", ["bimlp.py:smoke", "bimlp_small.py:arms=sign,smoke"])
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


def test_the_arms_of_the_small_study_differ_in_their_quantisers_alone():
    arms = [arm.to_dict() for arm in bimlp_small.get_config(EVERY).students.values()]
    assert {(arm["options"].pop("activation"), arm["options"].pop("weights")) for arm in arms} == {
        ("real", "real"),
        ("ternary", "real"),
        ("ternary", "xnor"),
        ("sign", "xnor"),
    }
    assert all(arm == arms[0] for arm in arms)


def test_the_steps_differ_in_weights_and_their_decay():
    first, second = (bimlp.get_config(f"variant=bimlp_m,step={step},activation=sign") for step in (1, 2))
    found = [(c.students.kd.options.weights, c.optimizer.weight_decay) for c in (first, second)]
    assert found == [("real", 0.05), ("xnor", 0.0)]
    assert second.students.kd.model == "bimlp_m" and second.students.kd.options.activation == "sign"
    assert (second.students.kd.loss, second.students.kd.label_weight, second.ema) == ("kd", 0.0, (0.99996,))
    with pytest.raises(ValueError, match="step: 3 is neither 1"):
        bimlp.get_config("step=3")
    with pytest.raises(ValueError, match="arms: no arm 'signs'"):
        bimlp_small.get_config("arms=real+signs")


@pytest.mark.parametrize("name", ["bimlp", "bimlp_small"])
def test_a_config_says_how_to_run_it(name):
    text = (ROOT / f"{name}.py").read_text().split('"""')[1]
    for word in ("Command:", "Hardware:", "Published:", f"configs/backbones/{name}.py"):
        assert word in text, f"its docstring lacks {word!r}"
