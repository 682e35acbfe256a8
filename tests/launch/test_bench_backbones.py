"""`bench backbones` end to end on small networks, with a stand-in for PyTorch's process."""

import json
import stat
import sys

import numpy as np
import pytest

from launch import bench_backbones, bench_train
from launch.bench_train import EAGER
from research.backbones import published, vanillanet

# Speaks the protocol of launch.bench_torch: a training step takes half a second, a forward pass an eighth.
PEER = """#!{python}
import json, sys
print(json.dumps({{"ready": {params}, "version": "torch 0, timm 0"}}), flush=True)
for line in sys.stdin:
    count, mode = line.split()
    print(json.dumps({{"seconds": {{"train": 0.5, "forward": 0.125}}[mode] * int(count)}}), flush=True)
"""
SMALL = "--size 32 --classes 100 --batch 8 --steps 2 --rounds 3".split()


def test_throughput(tmp_path, capsys, golden, monkeypatch):
    monkeypatch.setattr(bench_train, "peak", lambda *_: 1e12)
    counts = json.loads((golden / "kdlosses" / "counts.json").read_text())["resnet8"]
    peer, out = tmp_path / "python", tmp_path / "out.json"
    peer.write_text(PEER.format(python=sys.executable, params=counts["params"] + 1))
    peer.chmod(peer.stat().st_mode | stat.S_IXUSR)
    words = [*SMALL, "--models", "resnet8", "--deploy", "", "--torch-python", str(peer), "--json", str(out)]
    assert bench_backbones.main(words) == 0

    found = json.loads(out.read_text())
    assert (found["dtype"], found["deploy"]) == ("float32", [])
    forward, train = found["throughput"]
    assert (forward["model"], forward["work"], train["model"], train["work"]) == (
        *("resnet8 forward", 2),
        *("resnet8 train", 6),
    )
    assert (train["params"], train["macs"]) == (counts["params"], counts["macs"])
    assert forward["seconds"][EAGER] == [0.125] * 3 and train["seconds"][EAGER] == [0.5] * 3
    for bench in (forward, train):
        times = bench["seconds"][bench_backbones.OURS]
        assert len(times) == 3 and all(0 < t < 10 for t in times)
    text = capsys.readouterr().out
    for part in (
        "resnet8: 83,892 parameters",
        "forward: speed relative to PyTorch eager",
        "train: speed relative to PyTorch eager",
        "torch 0, timm 0",
        "peak: 1 TFLOP/s",
        "not the same model",
    ):
        assert part in text


def test_deploy_forms(capsys, monkeypatch):
    monkeypatch.setattr(bench_backbones, "RESNETS", {"resnet8": 75.0})
    options = ["--models", "", "--deploy", "vanillanet_6", "--batches", "1,3", "--passes", "2", *SMALL]
    options = bench_backbones.checked(bench_backbones.parser().parse_args(options))
    found = bench_backbones.deployed("vanillanet_6", options, dims=(8, 16, 32, 32, 32))
    assert [deploy.batch for deploy in found] == [1, 3]
    for deploy in found:
        names = (bench_backbones.TRAIN_FORM, bench_backbones.DEPLOY_FORM, "resnet8")
        assert {name: len(times) for name, times in deploy.seconds.items()} == dict.fromkeys(names, 3)
        assert all(0 < t < 10 for times in deploy.seconds.values() for t in times)
        assert deploy.top1 == {"vanillanet_6": 76.36, "resnet8": 75.0}
        assert deploy.difference < 1e-5
    bench_backbones.report_deploy(found[0], bench_backbones.Console(highlight=False))
    text = capsys.readouterr().out
    assert "vanillanet_6 (76.36 % top-1 published), batch 1" in text and "resnet8 (75.00 %)" in text


def test_every_vanillanet_with_a_published_accuracy_has_a_rival():
    trained = [name for name in vanillanet.VARIANTS if not name.endswith("_deploy") and name in published.IMAGENET]
    options = bench_backbones.checked(bench_backbones.parser().parse_args(["--deploy", "all"]))
    assert sorted(options.deploy) == sorted(trained) and len(trained) == 11
    rivals = {name: bench_backbones.rival(name) for name in trained}
    assert rivals["vanillanet_5"] == "resnet18" and rivals["vanillanet_9"] == "resnet50"
    gaps = [published.IMAGENET[name].top1 - bench_backbones.RESNETS[other] for name, other in rivals.items()]
    assert np.max(np.abs(gaps)) < 2


def test_rounds_take_turns_and_the_first_is_not_counted():
    calls = []

    def window(name, seconds):
        times = iter(seconds)
        return lambda count: calls.append((name, count)) or next(times)

    found = bench_backbones.in_turns({"a": window("a", [9, 1, 2]), "b": window("b", [9, 3, 4])}, 2, 2)
    assert found == {"a": [0.5, 1.0], "b": [1.5, 2.0]}
    assert calls == [("a", 2), ("b", 2)] * 3
    deploy = bench_backbones.Deploy("m", "r", {}, 1, 0.0, {bench_backbones.DEPLOY_FORM: [1.0, 2.0], "r": [3.0, 1.0]})
    assert deploy.ratios("r") == [0.5, 3.0] and bench_backbones.spread([3.0, 0.5, 1.0]) == "1.00 (0.50 to 3.00)"


@pytest.mark.parametrize(
    "words, told",
    [
        (["--models", "convnext_tinny"], "convnext_tiny"),
        (["--rounds", "0"], "--rounds 0"),
        (["--batches", "1,x"], "--batches"),
        (["--modes", "eval"], "forward, train"),
        (["--deploy", "vanillanet_4"], "vanillanet_5"),
    ],
)
def test_bad_options_are_one_line(capsys, words, told):
    assert bench_backbones.main(words) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and told in lines[0]
