"""Exports run without the code that made them and agree with the network; every mistake is one line."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import common
from launch import export as command
from launch import train
from research import backbones
from research.backbones import classify
from research.core import config as configs
from research.core import overrides
from research.port import checkpoint, export
from tests.backbones import drawn, tiny
from tests.launch import tiny as tiny_run

# Batch norm, tokens with two classifiers, shifted windows, binary layers, a kernel for every example.
FAMILIES = ("resnet", "vit", "swin", "bimlp", "parameternet")
OUTPUTS = ("logits", "pooled")
# What a user has who has JAX and nothing of this project; argument: a folder of exports, with images.
FRESH = """
import pathlib, sys
import jax, numpy as np
from jax import export
folder = pathlib.Path(sys.argv[1])
images, found = dict(np.load(folder / "images.npz")), {}
for file in sorted(folder.glob("*.stablehlo")):
    program = export.deserialize(bytearray(file.read_bytes()))
    for name, value in jax.jit(program.call)(images[file.stem]).items():
        found[f"{file.stem}/{name}"] = np.asarray(value)
assert not [name for name in sys.modules if name.partition(".")[0] in ("research", "launch", "flax")]
np.savez(folder / "found.npz", **found)
"""


def network(family: str, **options) -> tuple[classify.Network, dict]:
    name, changes, side = tiny.square(family)
    made = classify.network(name, 7, side, **{**changes, **options})
    return made, drawn.variables(made.module, made.example())


def answers(made: classify.Network, variables: dict, images) -> dict:
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    logits, endpoints, _ = jax.jit(lambda x: made.apply(params, state, classify.unit(x)))(images)
    return {"logits": logits, **endpoints}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-8 of 7 classes: (its official file, network, variables)."""
    made = classify.network("resnet8", 7, 32)
    variables = drawn.variables(made.module, made.example())
    file = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    checkpoint.save_official(variables, "resnet8", file)
    return str(file), made, variables


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    """An export of that ResNet by the command: for any batch, by the file's own number of classes."""
    file = tmp_path_factory.mktemp("export") / "resnet8.stablehlo"
    words = ["--model", "resnet8", "--weights", weights[0], "--to", str(file), "--batch", "any"]
    assert command.main(words) == 0
    return file


def test_families_agree_in_a_process_that_knows_no_model(tmp_path):
    images, expected = {}, {}
    for family in FAMILIES:
        made, variables = network(family)
        program = export.program(made, variables, batch="any", outputs=OUTPUTS)
        assert program.platforms == ("cpu", "tpu", "cuda")
        (tmp_path / f"{family}.stablehlo").write_bytes(program.serialize())
        images[family] = np.random.default_rng(1).random((3, made.size, made.size, 3), np.float32)
        expected |= {f"{family}/{n}": answers(made, variables, images[family])[n] for n in OUTPUTS}
    np.savez(tmp_path / "images.npz", **images)
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], check=True, cwd=tmp_path)
    found = dict(np.load(tmp_path / "found.npz"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(value))))


def test_any_batch_and_the_normalisation_are_inside(exported, weights):
    _, made, variables = weights
    program = export.load(exported)
    for count in (1, 4):
        images = np.random.default_rng(count).random((count, 32, 32, 3), np.float32)
        mean, std = (np.asarray(x, np.float32)[None, None, None] for x in (made.mean, made.std))
        logits, _ = jax.jit(made.module.apply)(variables, (images - mean) / std)
        np.testing.assert_allclose(program(images), logits, rtol=1e-4, atol=1e-4)
    described = program.description
    assert described["normalisation"]["mean"] == list(made.mean) and described["jax"] == jax.__version__
    assert described["images"]["shape"] == ["any", 32, 32, 3] and described["platforms"] == ["cpu", "tpu", "cuda"]
    assert described["outputs"] == {"": {"shape": ["any", 7], "dtype": "float32"}}


def test_checked_by_the_command(exported, tmp_path, capsys):
    assert command.main(["--check", str(exported)]) == 0
    assert "agrees with the network" in capsys.readouterr().out
    copy = tmp_path / exported.name
    copy.write_bytes(exported.read_bytes())
    description = json.loads((exported.parent / f"{exported.name}.json").read_text())
    description["probe"][""]["values"][0] += 0.01 * description["probe"][""]["largest"]
    (tmp_path / f"{exported.name}.json").write_text(json.dumps(description))
    assert command.main(["--check", str(copy)]) == 1
    assert "DIFFERS FROM" in capsys.readouterr().out


def test_weights_apart_images_of_bytes_and_bfloat16(weights, tmp_path):
    path, made, variables = weights
    target = tmp_path / "apart.stablehlo"
    words = ["--model", "resnet8", "--weights", path, "--to", str(target), "--separate-weights", "--batch", "2"]
    assert command.main([*words, "--images", "uint8", "--dtype", "bfloat16", "--platforms", "cpu"]) == 0
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    found = export.load(target)(images)
    stored = safetensors.numpy.load_file(tmp_path / "apart.safetensors")
    plain = jax.export.deserialize(bytearray(target.read_bytes())).call(stored, images)
    np.testing.assert_array_equal(found, plain)
    exact = np.asarray(answers(made, variables, images)["logits"])
    np.testing.assert_allclose(found, exact, atol=0.03 * np.max(np.abs(exact)))
    assert found.dtype == jnp.float32
    assert command.main(["--check", str(target)]) == 0
    assert target.stat().st_size < 0.6 * (tmp_path / "apart.safetensors").stat().st_size
    other = {**stored, "params/fc/bias": np.zeros(3, np.float32)}
    safetensors.numpy.save_file(other, tmp_path / "apart.safetensors")
    with pytest.raises(ValueError, match="weights of another export"):
        export.load(target)


def test_positions_follow_the_size(tmp_path, monkeypatch):
    name, side = tiny.use(monkeypatch, "vit")
    variables = drawn.variables(backbones.create(name), jnp.zeros((1, side, side, 3)))
    checkpoint.save_official(variables, name, tmp_path / "w.safetensors")
    target = tmp_path / "v.stablehlo"
    words = ["--model", name, "--weights", str(tmp_path / "w.safetensors"), "--to", str(target), "--size", "24"]
    assert command.main([*words, "--platforms", "cpu", "--outputs", "tokens"]) == 0
    assert export.load(target)(jnp.zeros((1, 24, 24, 3))).shape == (1, 11, 16)


def test_weights_of_another_network_are_not_taken_for_an_arm(run, tmp_path, capsys):
    folder, made = run
    other = tmp_path / "run"
    configs.claim(other, configs.from_json((folder / configs.FILE).read_text()))
    checkpoint.save_variables(made["small"][1], other / train.WEIGHTS / "deep.safetensors")
    assert command.main(["--run", str(other), "--arm", "deep", "--to", str(tmp_path / "x.stablehlo")]) == 1
    assert "not the weights of" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of two arms, one a VanillaNet, by what it leaves behind."""
    folder = tmp_path_factory.mktemp("run")
    config, sizes = tiny_run.get_config(), {"dims": (8, 12, 16), "strides": (2, 1), "act_num": 1}
    config.students.deep = common.student("vanillanet_5", options=sizes)
    config = overrides.freeze(overrides.thaw(config))
    configs.claim(folder, config)
    made = {}
    for arm, student, options in (
        ("small", "small", {}),
        ("deep_ema0.9", "deep", {}),
        ("deep_ema0.9_deploy", "deep", {"deploy": True}),
    ):
        student = config.students[student]
        net = classify.network(student.model, 10, 8, **{**student.options, **options})
        made[arm] = net, drawn.variables(net.module, net.example())
        checkpoint.save_variables(made[arm][1], folder / train.WEIGHTS / f"{arm}.safetensors")
    return folder, made


@pytest.mark.parametrize("arm", ["small", "deep_ema0.9", "deep_ema0.9_deploy"])
def test_an_arm_of_a_run(run, arm, tmp_path):
    """By its name alone: the network, its options and its classes are those of the run."""
    folder, made = run
    target = tmp_path / "arm.stablehlo"
    assert command.main(["--run", str(folder), "--arm", arm, "--to", str(target), "--platforms", "cpu"]) == 0
    image = np.random.default_rng(0).random((1, 8, 8, 3), np.float32)
    expected = answers(*made[arm], image)["logits"]
    np.testing.assert_allclose(export.load(target)(image), expected, rtol=1e-4, atol=1e-4)


class Counting:
    """A network that loops over its images, which it can only do for a number of them."""

    name, size, mean, std = "loop", 8, (0.0,), (1.0,)

    def apply(self, params, state, images):
        return jnp.stack([images[i].mean() for i in range(images.shape[0])])[:, None], {}, state


def test_a_network_that_has_to_know_its_batch():
    with pytest.raises(ValueError, match="batch: loop has to know how many images it gets: give a number"):
        export.program(Counting(), {"params": {"w": np.zeros(1)}}, batch="any")
    assert export.program(Counting(), {"params": {"w": np.zeros(1)}}, batch=2).out_avals[0].shape == (2, 1)


def test_a_program_that_its_container_cannot_hold(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST", 1000)
    with pytest.raises(ValueError, match="exceed 2 GiB: pass --separate-weights"):
        export.save(tmp_path / "x.stablehlo", weights[1], weights[2])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "images, shown",
    [
        (np.zeros((1, 16, 32, 3), np.float32), "(1, 16, 32, 3) of float32"),
        (np.zeros((32, 32, 3), np.float32), "(32, 32, 3) of float32"),
        (np.zeros((1, 32, 32, 3), np.uint8), "(1, 32, 32, 3) of uint8"),
    ],
)
def test_images_that_do_not_fit(exported, images, shown):
    with pytest.raises(ValueError, match="takes images") as caught:
        export.load(exported)(images)
    assert "(any, 32, 32, 3) of float32 in [0, 1], these are " + shown in str(caught.value)


def test_what_is_no_export_or_not_for_here(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match="no export at"):
        export.load(tmp_path / "none.stablehlo")
    file, beside = export.files(tmp_path / "x.stablehlo")[:2]
    file.write_bytes(exported.read_bytes())
    with pytest.raises(ValueError, match="no export of ours"):
        export.load(file)
    beside.write_text("[]")
    with pytest.raises(ValueError, match="no description of an export"):
        export.load(file)
    description = json.loads(export.files(exported).description.read_text())
    beside.write_text(json.dumps({**description, "platforms": ["tpu"]}))
    with pytest.raises(ValueError, match="made for tpu, this is cpu: export it with --platforms tpu,cpu"):
        export.load(file)
    beside.write_text(json.dumps(description))
    file.write_bytes(exported.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        export.load(file)


@pytest.mark.parametrize(
    "words, text",
    [
        ("--model resnet8", "give --to, and --model with --weights or --run with --arm"),
        ("--model resnet8 --weights W --to x.onnx", "x.onnx: exports end in .stablehlo"),
        ("--model resnet8 --weights W --to x.stablehlo --outputs pooledd", "has no 'pooledd'; did you mean 'pooled'?"),
        ("--model resnet8 --weights W --to x.stablehlo --platforms gpu", "--platforms: 'gpu' is none of cpu"),
        ("--model resnet8 --weights W --to x.stablehlo --batch 0", "--batch: '0' is neither"),
        ("--model resnet14 --weights W --to x.stablehlo", "no checkpoint of resnet14"),
        ("--model resnet8 --weights W --to OLD", "resnet8.stablehlo exists: choose another --to, or pass --overwrite"),
        ("--run /nowhere --to x.stablehlo", "/nowhere: no run here"),
        ("--run RUN --arm dep --to x.stablehlo", "trained deep_ema0.9, deep_ema0.9_deploy, small, not 'dep'"),
        ("--run RUN --arm small --size 9 --to x.stablehlo", "--size: a run's networks keep their size"),
        ("--chek x.stablehlo", "did you mean --check?"),
    ],
)
def test_refusals_are_one_line(words, text, weights, exported, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"W": weights[0], "OLD": str(exported), "RUN": str(run[0])}
    assert command.main([names.get(word, word) for word in words.split()]) == 1
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error
    assert not list(tmp_path.glob("x.*"))
