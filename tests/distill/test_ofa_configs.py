"""The OFA-KD configs: the authors' recipes, what is known of each pair, and two steps of a Swin student."""

import pathlib

import jax
import pytest

from configs.distill import ofa
from launch import train
from research import backbones
from research.core import config as configs
from research.core import writers

ROOT = pathlib.Path(__file__).parents[2] / "configs" / "distill"
ALL = [(recipe, pair) for recipe, pairs in ofa.PAIRS.items() for pair in pairs]


def load(recipe, argument):
    return configs.load(f"{ROOT / f'ofa_{recipe}.py'}:{argument}")


@pytest.mark.parametrize("recipe, pair", ALL)
def test_every_pair_names_models_that_exist(recipe, pair):
    c = load(recipe, f"pair={pair}")
    assert {c.teacher.model, c.students.ofa.model} <= set(backbones.variants())
    assert c.students.ofa.loss_options.eps == c.students.ofa.hint_options.eps >= 1.0
    # Only convolutional students have batch norms, and only CIFAR's images another normalisation.
    assert ("bn_group" in c.students.ofa.options) == (pair.split("-")[1] in ("resnet18", "resnet50", "mobilenetv2"))
    assert ("mean" in c.students.ofa.options) == ("mean" in c.teacher.options) == recipe.startswith("cifar")


@pytest.mark.parametrize(
    "recipe, epochs, batch, optimizer, lr, min_lr, decay, schedule, warmup",
    [
        ("imagenet_cnn", 100, 512, "nesterov", 0.1, 1e-6, 1e-4, "step", (3, 1e-4)),
        ("imagenet_tokens", 300, 1024, "adamw", 5e-4, 1e-6, 0.05, "cosine", (20, 5e-7)),
        ("imagenet_stronger", 300, 2048, "lamb", 5e-3, 1e-6, 0.02, "cosine", (5, 1e-6)),
        ("cifar_cnn", 300, 1024, "nesterov", 0.05, 1e-3, 2e-3, "cosine", (3, 1e-4)),
        ("cifar_tokens", 300, 1024, "adamw", 5e-4, 1e-5, 0.05, "cosine", (20, 5e-7)),
    ],
)
def test_recipes_are_the_authors_files(recipe, epochs, batch, optimizer, lr, min_lr, decay, schedule, warmup):
    c, share = ofa.recipe(recipe)
    assert (c.epochs, c.batch_size, c.optimizer.name, c.optimizer.lr) == (epochs, batch, optimizer, lr)
    assert (c.schedule.min_lr, c.optimizer.weight_decay, c.schedule.name) == (min_lr, decay, schedule)
    assert (c.schedule.warmup_epochs, c.schedule.warmup_lr, 8 * share) == (*warmup, batch)


def test_what_is_known_of_a_pair_changes_the_recipe():
    c = load("cifar_cnn", "pair=swin_t-resnet18")
    assert (c.optimizer.lr, c.students.ofa.hint_weight, c.students.ofa.loss_weight) == (0.1, 0.1, 1.0)
    c = load("cifar_tokens", "pair=mixer_b-swin_p")
    assert (c.schedule.min_lr, c.ema, c.eval.crop) == (1e-6, (0.99996,), 0.9)
    c = load("imagenet_cnn", "eps=1.2,arms=none+kd+ofa")
    assert set(c.students) == {"none", "kd", "ofa"} and c.students.ofa.loss_options.eps == 1.2
    assert {s.label_loss for s in c.students.values()} == {"ce"} and {s.smoothing for s in c.students.values()} == {0.1}
    assert load("imagenet_stronger", "").students.ofa.label_loss == "bce"


@pytest.mark.parametrize("argument, message", [("pair=deit_t-vgg", "there are deit_t-resnet18"), ("arms=of", "no arm")])
def test_unknown_pairs_and_arms_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        load("imagenet_cnn", argument)


def test_a_student_of_windows_trains_two_steps(tmp_path, monkeypatch):
    """Students of the other kinds are trained by tests/distill/test_vanilla_kd.py."""
    bind = train.runner.build
    monkeypatch.setattr(train.runner, "build", lambda e, **o: bind(e, **{"devices": jax.devices()[:1], **o}))
    train.run(load("cifar_tokens", "pair=convnext_t-swin_p,smoke"), tmp_path)
    rows = writers.read_rows(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert rows[-1]["kind"] == "done" and all(value is not None for row in rows for value in row.values())
