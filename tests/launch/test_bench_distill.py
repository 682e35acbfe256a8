"""`bench distill` end to end on a small pair, and what its figures mean."""

import json

import pytest

from launch import bench_distill
from research.core import config as configs
from tests.launch import tiny

PAIR = "--student resnet8 --teacher resnet8 --size 8 --classes 5 --batch 4 --rounds 2".split()


def test_every_figure_is_there(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert bench_distill.main([*PAIR, "--losses", "kd", "--hints", "manifold", "--json", str(out)]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    for part in ("student alone: ", "teacher forward: ", "by itself", "manifold: not measured (no blocks"):
        assert part in text
    assert [arm["name"] for arm in found["arms"]] == ["kd"] and found["teacher"] == "resnet8"
    assert len(found["forward"]) == 2
    for arm in found["arms"]:
        assert all(len(arm[name]) == 2 and min(arm[name]) > 0 for name in ("step", "without", "alone"))
        assert max(arm["alone"]) < max(arm["step"]) and arm["params"] == 0


def test_losses_by_themselves(tmp_path):
    out = tmp_path / "out.json"
    assert bench_distill.main([*PAIR, "--losses", "kd,ofa", "--hints", "", "--alone", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(arm["name"], arm["step"], len(arm["alone"])) for arm in found["arms"]] == [("kd", [], 2), ("ofa", [], 2)]


def test_a_config_is_measured_with_its_own_arms():
    config = bench_distill.prepared(configs.freeze(tiny.get_config()))
    assert (config.data.num_classes, config.data.num_examples, config.batch_size) == (10, 1442, 16)
    bench = bench_distill.measure(config, rounds=1, steps=1)
    (arm,) = bench.arms
    assert (arm.name, arm.kind, arm.bytes, arm.params) == ("small", "labels", 0, 0)
    assert arm.step == arm.without and arm.added == [0.0] and arm.alone == [] and bench.forward == []


@pytest.mark.parametrize(
    "words, message",
    [
        (["--losses", "kdd"], "did you mean 'kd'"),
        (["--rounds", "0"], "--rounds 0: must be 1 or more"),
        (["--config.seed=1"], "there is no --config"),
    ],
)
def test_wrong_options_are_one_line(words, message, capsys):
    assert bench_distill.main(words) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
