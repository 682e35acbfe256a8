"""launch.evaluate on a checkpoint under official names, and what it refuses."""

import json

import numpy as np
import pytest

from launch import evaluate
from research import backbones
from research.port import checkpoint
from tests.backbones import drawn


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-8 of 10 classes under official names, whose classifier always answers class 3."""
    file = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    image = np.zeros((1, 32, 32, 3), np.float32)
    variables = drawn.variables(backbones.create("resnet8", num_classes=10), image)
    variables["params"]["fc"]["kernel"] = np.zeros_like(variables["params"]["fc"]["kernel"])
    variables["params"]["fc"]["bias"] = np.eye(10, dtype=np.float32)[3]
    checkpoint.save_official(variables, "resnet8", file)
    return file


def test_official_weights_on_the_digits(weights, capsys):
    words = ["--model", "resnet8", "--weights", str(weights), "--data", "digits", "--split", "test"]
    assert evaluate.main([*words, "--batch-size", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # 355 digits in batches of 100: the padding of the last one does not count. 36 of them are a three.
    assert found["top1"] == pytest.approx(36 / 355)
    assert found["loss"] == pytest.approx(np.log(np.e + 9) - 36 / 355, rel=1e-5)


@pytest.mark.parametrize(
    "words, text",
    [
        ("--model resnet8", "give --run, or --model with --weights and --data"),
        ("--run /nowhere", "no run here"),
        ("--model resnet8 --weights /nowhere.safetensors --data digits --split test", "/nowhere.safetensors"),
        ("--modl resnet8", "did you mean --model?"),
    ],
)
def test_refusals_are_one_line(words, text, capsys):
    assert evaluate.main(words.split()) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
