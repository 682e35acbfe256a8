"""The converter: both directions, and every mistake on one line that overwrites nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from launch import convert
from research import backbones
from research.port import checkpoint
from tests.backbones import drawn, tiny

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


def _tiny(family, tmp_path, monkeypatch, dialect=None):
    """(variant made tiny, its variables, a file of them under official names)."""
    name, side = tiny.use(monkeypatch, family)
    variables = drawn.variables(backbones.create(name), jnp.zeros((1, side, side, 3)))
    checkpoint.save_official(variables, name, tmp_path / "official.safetensors", dialect=dialect)
    return name, variables, tmp_path / "official.safetensors"


@pytest.mark.parametrize("family", backbones.FAMILIES)
def test_every_family_there_and_back_in_every_dialect(family, tmp_path, monkeypatch):
    for dialect in backbones.family(tiny.square(family)[0]).NAMES:
        name, variables, official = _tiny(family, tmp_path, monkeypatch, dialect)
        ours, again = tmp_path / "ours.safetensors", tmp_path / "again.safetensors"
        for source, target in ((official, ours), (ours, again)):
            words = ["--model", name, "--from", source, "--to", target, "--dialect", dialect, "--overwrite"]
            assert convert.main(list(map(str, words))) == 0
        jax.tree.map(np.testing.assert_array_equal, checkpoint.load_variables(ours), variables)
        assert again.read_bytes() == official.read_bytes()


@pytest.mark.parametrize("family, deployed", [("vanillanet", "vanillanet_5_deploy"), ("bimlp", "bimlp_s")])
def test_merged_weights_compute_the_same(family, deployed, tmp_path, monkeypatch, capsys):
    name, variables, official = _tiny(family, tmp_path, monkeypatch)
    words = ["--model", name, "--from", str(official), "--to", str(tmp_path / "ours"), "--merge"]
    assert convert.main(words) == 0
    assert "(our names)" in capsys.readouterr().out
    found = checkpoint.load_official(deployed, tmp_path / "ours" / f"{deployed}.safetensors", num_classes=7)
    image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
    expected, _ = jax.jit(backbones.create(name).apply)(variables, image)
    logits, _ = jax.jit(backbones.create(deployed).apply)(found, image)
    assert float(jnp.max(jnp.abs(logits - expected))) <= 1e-5 * float(jnp.max(jnp.abs(expected)))
    # From our own file, and with official names: the same arrays.
    checkpoint.save_variables(variables, tmp_path / "trained.safetensors")
    words = ["--model", name, "--from", str(tmp_path / "trained.safetensors"), "--merge"]
    for names in ("official", "ours"):
        target = tmp_path / f"merged_{names}.safetensors"
        assert convert.main([*words, "--to", str(target), "--names", names]) == 0
        assert checkpoint.is_own(target) == (names == "ours")
        jax.tree.map(np.testing.assert_array_equal, checkpoint.load_official(deployed, target, num_classes=7), found)


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
        (
            ["--merge", "--from", "OFFICIAL"],
            "resnet8 is deployed as it is trained: only vanillanet and bimlp can be merged",
        ),
        (["--model", "vanillanet_5_deploy", "--merge", "--from", "OFFICIAL"], "name the trained one, vanillanet_5"),
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
