"""The converter: both directions, and every mistake on one line that overwrites nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from launch import convert
from research import backbones
from research.port import checkpoint
from tests.backbones import drawn

MODEL = "resnet8"


@pytest.fixture
def official(tmp_path):
    """An official file with 7 classes and its variables."""
    variables = drawn.variables(backbones.create(MODEL, num_classes=7), jnp.zeros((1, 32, 32, 3)))
    checkpoint.save_official(variables, MODEL, tmp_path / "official.safetensors")
    return tmp_path / "official.safetensors", variables


def run(*arguments) -> int:
    return convert.main(["--model", MODEL, *map(str, arguments)])


def test_there_and_back(official, tmp_path, capsys):
    source, variables = official
    assert run("--from", source, "--to", tmp_path / "ours") == 0
    ours = tmp_path / "ours" / "resnet8.safetensors"
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_variables(ours), variables)
    assert run("--from", ours, "--to", tmp_path / "again.safetensors") == 0
    before, after = (safetensors.numpy.load_file(path) for path in (source, tmp_path / "again.safetensors"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    lines = capsys.readouterr().out.splitlines()
    assert "(our names)" in lines[0] and "(official names)" in lines[1]


def test_a_new_head(official, tmp_path):
    target = tmp_path / "t.safetensors"
    assert run("--from", official[0], "--to", target, "--num-classes", 3, "--new-head", 0) == 0
    assert checkpoint.load_variables(target)["params"]["fc"]["bias"].shape == (3,)


def test_an_existing_file_is_kept_unless_told(official, tmp_path, capsys):
    target = tmp_path / "t.safetensors"
    target.write_bytes(b"precious")
    assert run("--from", official[0], "--to", target) == 1
    assert target.read_bytes() == b"precious"
    assert "exists: choose another --to, or pass --overwrite" in capsys.readouterr().err
    assert run("--from", official[0], "--to", target, "--overwrite") == 0
    assert "fc" in checkpoint.load_variables(target)["params"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from", "nowhere.safetensors"], "no checkpoint file at nowhere.safetensors"),
        (["--model", "resnet9", "--from", "OFFICIAL"], "unknown model 'resnet9'; did you mean"),
        (["--model", "resnet14", "--from", "OFFICIAL"], "no checkpoint of resnet14: "),
        (["--dialect", "keras", "--from", "OFFICIAL"], "dialect: 'keras' is none of"),
        (["--num-classes", "5", "--from", "OFFICIAL"], "has 7 classes, resnet8 is to have 5"),
    ],
)
def test_mistakes_end_with_a_clear_line(official, tmp_path, capsys, arguments, message):
    target = tmp_path / "t.safetensors"
    arguments = [str(official[0]) if argument == "OFFICIAL" else argument for argument in arguments]
    assert run(*arguments, "--to", target) == 1
    error = capsys.readouterr().err
    assert message in error.splitlines()[0] and "Traceback" not in error
    assert not target.exists()
