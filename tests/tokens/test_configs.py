"""The configs of token reduction: the small study end to end, off the shelf and calibrated, and the authors' recipe."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

from configs.tokens import cifar_small, ppt_deit_s
from launch import calibrate, evaluate, train
from research.backbones import vit
from research.core import config as configs
from research.core import writers
from research.core.errors import UserError
from research.layers import reduction
from research.port import checkpoint
from research.tokens import budget

ROOT = pathlib.Path(cifar_small.__file__).parent
pytestmark = pytest.mark.usefixtures("one_device")
STUDY, RECIPE = f"{ROOT}/cifar_small.py", f"{ROOT}/ppt_deit_s.py"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, one_device):
    """Folder of the small study off the shelf: a dense network trained for two steps, its weights in all arms."""
    folder = tmp_path_factory.mktemp("shelf")
    train.run(configs.load(f"{STUDY}:shelf,smoke,arms=ppt+evit,threshold=1e-4"), folder)
    return folder


def scores(folder):
    last = [row for row in writers.read_rows(folder) if row["kind"] == "eval"][-1]
    return {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")}


def test_off_the_shelf_arms_have_the_dense_weights_and_fewer_tokens(shelf, capsys):
    found = scores(shelf)
    trained = checkpoint.load_variables(shelf / "teacher" / "weights" / "teacher.safetensors")
    for name in ("ppt", "evit"):
        own = checkpoint.load_variables(shelf / "weights" / f"{name}.safetensors")
        jax.tree.map(np.testing.assert_array_equal, own, trained)
    assert len({found[f"{name}/loss"] for name in ("teacher", "ppt", "evit")}) == 3
    # The same by the command that evaluates any run with fewer tokens.
    words = ["--run", str(shelf / "teacher"), "--reduce", "evit:keep_rate={},blocks=0+1", "--json"]
    rate = configs.load(f"{STUDY}:smoke").students.evit.options.reduce.keep_rate
    assert evaluate.main([word.format(rate) for word in words]) == 0
    assert json.loads(capsys.readouterr().out)["teacher/loss"] == pytest.approx(found["evit/loss"], rel=1e-5)


def test_the_command_finds_thresholds(shelf, capsys):
    words = ["--run", str(shelf / "teacher"), "--images", "48", "--batch-size", "48"]
    assert calibrate.main([*words, "--reduce", "ppt:r=5+4,blocks=0+1", "--share", "0.25"]) == 0
    text = capsys.readouterr().out
    assert "48 images, 0.25 of them pruned" in text
    (line,) = re.findall(r"^threshold=(.+)$", text, re.MULTILINE)
    students = configs.load(f"{STUDY}:smoke,threshold={line}").students
    assert len(students.ppt.options.reduce.threshold) == 2 and min(students.ppt.options.reduce.threshold) > 0
    for more, message in ((["--reduce", "tome:r=3"], "has no threshold"), (["--images", "0"], "must be 1 or more")):
        assert calibrate.main([*words, "--reduce", "ppt:r=1", *more]) == 1
        assert message in capsys.readouterr().err
    assert evaluate.main("--model resnet8 --weights x --data digits --split test --reduce tome:r=1".split()) == 1
    assert "resnet8 has no tokens to reduce" in capsys.readouterr().err


def test_fine_tuning_trains(tmp_path):
    train.run(configs.load(f"{RECIPE}:smoke,arms=ppt"), tmp_path)
    rows = writers.read_rows(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2] and rows[-1]["kind"] == "done"
    assert all(value is not None for row in rows for value in row.values())


@pytest.mark.parametrize("keep", [0.8, 0.63])
def test_arms_have_equal_multiply_adds_and_differ_in_their_reduction_alone(keep):
    students = configs.load(f"{STUDY}:keep={keep},threshold=1e-4+2e-4+3e-4").students
    assert tuple(sorted(students)) == tuple(sorted(cifar_small.ARMS))
    dense = budget.macs(vit.build(**cifar_small.SHAPE, num_classes=10)).total
    others = []
    for name, student in students.items():
        options = student.options.to_dict()
        reduce = options.pop("reduce", None)
        others.append({**student.to_dict(), "options": options})
        spent = budget.macs(vit.build(**options, reduce=reduce, num_classes=10)).total / dense
        assert spent == 1 if name == "dense" else keep - 0.015 < spent <= keep
    assert all(other == others[0] for other in others) and others[0]["weights"] == "teacher"
    kinds = [students[name].options.reduce.to_dict() for name in cifar_small.PPT]
    assert all(kind["r"] == kinds[0]["r"] for kind in kinds)
    assert kinds[0]["threshold"] == kinds[-1]["threshold"] == (1e-4, 2e-4, 3e-4)


def test_what_a_config_cannot_do_is_refused():
    for arg, message in (
        ("arms=ppt", "threshold: arm 'ppt' needs it; launch.calibrate finds it"),
        ("arms=tomme", "arms: no arm 'tomme'; there are dense, ppt"),
        ("threshold=1e-4+x", "threshold: '1e-4[+]x' is not one number, or 3 with"),
    ):
        with pytest.raises(UserError, match=message):
            cifar_small.get_config(arg)
    with pytest.raises(UserError, match="arms: no arm 'evit'"):
        ppt_deit_s.get_config("arms=evit")
    with pytest.raises(UserError, match="students.ppt.weights: needs a value"):
        configs.load(RECIPE)


def test_the_recipe_is_the_authors_script():
    given = [f"--config.students.{name}.weights=x" for name in ("none", "ppt", "prune")]
    c = configs.load(f"{RECIPE}:arms=none+ppt+prune", given)
    assert (c.epochs, c.batch_size, c.optimizer.name, c.optimizer.lr) == (30, 1024, "adamw", 2e-5)
    assert (c.optimizer.weight_decay, c.schedule.warmup_epochs, c.schedule.warmup_lr) == (0.05, 5, 1e-6)
    assert (c.schedule.min_lr, c.schedule.name, c.mix.mixup, c.mix.cutmix) == (1e-5, "cosine", 0.8, 1.0)
    assert (c.augment.auto, c.augment.erase, c.data.repeats) == ("rand-m9-mstd0.5-inc1", 0.25, 3)
    assert (c.ema, c.eval.crop, c.augment.interpolation) == ((0.99996,), 0.875, "bicubic")
    student = c.students.ppt
    assert (student.smoothing, student.label_loss, student.options.drop_path) == (0.1, "ce", 0.1)
    reduce = reduction.build(student.options.reduce)
    assert (reduce.r, reduce.blocks, reduce.threshold, reduce.policy) == (50, (3, 6, 9), 6e-5, "adaptive")
    assert "reduce" not in c.students.none.options and c.students.prune.options.reduce.policy == "prune"
    # What the official code counts for DeiT-S that always prunes.
    pruned = vit.build(**vit.VARIANTS[student.model], reduce=c.students.prune.options.reduce)
    assert budget.macs(pruned).total == 2_943_702_819


@pytest.mark.parametrize("name", ["cifar_small", "ppt_deit_s"])
def test_a_config_says_how_to_run_it(name):
    text = (ROOT / f"{name}.py").read_text().split('"""')[1]
    for word in ("Command:", "Hardware:", "Published:", f"configs/tokens/{name}.py"):
        assert word in text, f"its docstring lacks {word!r}"
