"""Deep training of VanillaNet: the official recipes, two steps of one, and a merge that changes no prediction."""

import pathlib

import jax
import pytest

from configs.backbones import vanillanet as recipe
from launch import train
from research.core import config as configs
from research.core import writers
from research.core.errors import UserError
from research.distill import deep_training
from research.port import checkpoint

CONFIG = pathlib.Path(recipe.__file__)


def load(arg, *overrides):
    return configs.load(f"{CONFIG}:{arg}", [f"--config.{text}" for text in overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Rows and folder of a run of two steps, the second of which has slope 1."""
    folder = tmp_path_factory.mktemp("run")
    bind = train.runner.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.runner, "build", lambda e, **o: bind(e, **{"devices": jax.devices()[:1], **o}))
        patch.setattr(train, "resolve", lambda c, data, resolve=train.resolve: _an_epoch_a_step(resolve(c, data)))
        train.run(load("smoke", "slope.decay_epochs=1"), folder)
    return writers.read_rows(folder), folder


def _an_epoch_a_step(config):
    config = config.copy_and_resolve_references().unlock()
    config.steps_per_epoch = 1
    return config.lock()


def test_the_smoke_form_trains_and_logs_the_slope(finished):
    rows, _ = finished
    assert [row["train/slope"] for row in rows if row["kind"] == "train"] == [0.0, 1.0]
    assert rows[-1]["kind"] == "done"
    assert all(value is not None for row in rows for value in row.values())


def test_at_slope_one_the_merged_network_scores_the_same(finished):
    rows, _ = finished
    last = [row for row in rows if row["kind"] == "eval"][-1]
    for name in ("model", "ema0.99996/model"):
        assert last[f"eval/{name}_deploy/loss"] == pytest.approx(last[f"eval/{name}/loss"], rel=1e-5)
        assert last[f"eval/{name}_deploy/top1"] == last[f"eval/{name}/top1"]


def test_merged_weights_are_written(finished):
    files = {path.stem: path for path in finished[1].rglob("*.safetensors")}
    assert {"model", "model_deploy", "model_ema0.99996", "model_ema0.99996_deploy"} <= set(files)
    merged = checkpoint.load_variables(files["model_deploy"])
    assert set(merged) == {"params"} and "cls_2" in merged["params"]


@pytest.mark.parametrize(
    "variant, lr, decay, mixup, layers",
    [
        (5, 3.5e-3, 0.35, 0.1, None),
        (6, 4.8e-3, 0.32, 0.15, 5),
        (7, 4.7e-3, 0.35, 0.4, 6),
        (8, 3.5e-3, 0.30, 0.4, None),
        (9, 3.5e-3, 0.30, 0.4, None),
        (10, 3.5e-3, 0.25, 0.4, None),
    ],
)
def test_recipes_are_the_readmes_commands(variant, lr, decay, mixup, layers):
    c = load(f"variant=vanillanet_{variant}")
    assert (c.optimizer.name, c.optimizer.lr, c.optimizer.weight_decay, c.mix.mixup) == ("lamb", lr, decay, mixup)
    assert (c.epochs, c.slope.decay_epochs, c.slope.curve, c.batch_size) == (300, 100, "linear", 1024)
    assert (c.augment.auto, c.augment.erase, c.ema, c.mix.cutmix) == ("rand-m7-mstd0.5-inc1", 0.25, (0.99996,), 1.0)
    options = c.optimizer.options
    assert options.eps == 1e-8 and (options.lr_scale.layers if layers else options.get("lr_scale")) == layers
    model = c.students.model
    assert (model.label_loss, model.smoothing, model.options.drop_rate) == ("bce", 0.1, 0.05)


def test_a_variant_without_recipe_is_refused():
    with pytest.raises(UserError, match="no recipe of 'vanillanet_4'; there are vanillanet_5"):
        recipe.get_config("variant=vanillanet_4")


def test_students_without_a_slope_are_refused():
    c = load("smoke", "students.model.options.deploy=true")
    data = train.open_data(c)
    with pytest.raises(ValueError, match="none is a VanillaNet in its train form"):
        deep_training.experiment(train.resolve(c, data))


def test_every_recipe_says_how_to_run_it():
    for path in CONFIG.parent.glob("*.py"):
        if "def get_config" in path.read_text():
            for word in ("Command:", "Hardware:", "Published:", "python -m launch", path.stem):
                assert word in path.read_text().split('"""')[1], f"{path.name}: its docstring lacks {word!r}"
