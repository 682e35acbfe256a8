"""Executables on file: written here, run in another process, refused with a reason everywhere else."""

import json
import os
import subprocess
import sys

import jax
import pytest

from launch import compile as launcher
from research.core import config as configs
from research.core.errors import UserError
from research.pods import aot, chips, measure

CONFIG = "tests/launch/tiny.py"
OVERRIDES = ["--config.eval.batch_size=16"]
# Loads the steps, runs two of them beside those that jit compiles, and prints whether all metrics are equal.
RUN = """
import sys
import jax, numpy as np
from launch import compile as launcher
from research.core import config as configs
from research.pods import aot

file, config, *overrides = sys.argv[1:]
p = launcher.prepare(configs.load(config, overrides), jax.devices())
loaded = aot.load(file, p.runner, p.config)
rng = np.random.default_rng(0)
batch = {k: rng.integers(0, 10, s.shape).astype(s.dtype) for k, s in p.batches["train"].items()}
rows = []
for runner in (p.runner, loaded):
    state, row = runner.init(jax.random.PRNGKey(0)), []
    for _ in range(2):
        state, metrics = runner.train_step(state, runner.put(batch))
        row.append(jax.device_get(metrics))
    row.append(jax.device_get(runner.eval_step(state, runner.put(batch))))
    rows.append(jax.tree.leaves(row))
assert type(loaded.train_step).__name__ == "Compiled", type(loaded.train_step)
assert int(state.step) == 2
jax.tree.map(np.testing.assert_array_equal, rows[0], rows[1])
print("equal", len(rows[0]))
"""


@pytest.fixture(scope="module")
def prepared():
    return launcher.prepare(configs.load(CONFIG, OVERRIDES), jax.devices())


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    target = tmp_path_factory.mktemp("aot") / "tiny.aot"
    assert (
        launcher.main(["--config", CONFIG, "--topology", "cpu:8", "--save", str(target), *OVERRIDES]) == launcher.FITS
    )
    return target


def test_another_process_runs_it_with_equal_results(file):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(file), CONFIG, *OVERRIDES], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal")


def test_keys_that_do_not_reach_the_program_may_differ(file, prepared):
    other = launcher.prepare(configs.load(CONFIG, [*OVERRIDES, "--config.log.every=7"]), jax.devices())
    assert aot.load(file, other.runner, other.config).devices == prepared.runner.devices


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["--config.optimizer.lr=0.5"], r"config\.optimizer\.lr: 0\.001 -> 0\.5"),
        (
            ["--config.parallel.axes.fsdp=2"],
            r'mesh: \{"data": 8, "fsdp": 1, "tensor": 1\}, here \{"data": 4, "fsdp": 2',
        ),
        (["--config.batch_size=32"], r"config\.batch_size: 16 -> 32"),
    ],
)
def test_another_config_is_named(file, overrides, message):
    other = launcher.prepare(configs.load(CONFIG, [*OVERRIDES, *overrides]), jax.devices())
    with pytest.raises(UserError, match=message):
        aot.load(file, other.runner, other.config)


def test_fewer_devices_are_named(file):
    other = launcher.prepare(configs.load(CONFIG, OVERRIDES), jax.devices()[:4])
    with pytest.raises(UserError, match="count: 8, here 4"):
        aot.load(file, other.runner, other.config)


def test_another_version_is_named(file, prepared, monkeypatch):
    monkeypatch.setattr(aot.jaxlib, "__version__", "0.0.1")
    with pytest.raises(UserError, match='jaxlib: "[0-9.]+", here "0.0.1"'):
        aot.load(file, prepared.runner, prepared.config)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda data: b"PK" + data, "not an executable that launch.compile --save wrote"),
        (lambda data: data[:-10], "cut short; save it again"),
        (lambda data: data.replace(b"{", b"", 1), "its header cannot be read"),
    ],
)
def test_broken_files(file, prepared, tmp_path, spoil, message):
    broken = tmp_path / "broken.aot"
    broken.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        aot.load(broken, prepared.runner, prepared.config)


def test_no_file(prepared, tmp_path):
    with pytest.raises(FileNotFoundError):
        aot.load(tmp_path / "none", prepared.runner, prepared.config)


def test_the_header_is_for_people_too(file):
    with open(file, "rb") as source:
        assert source.readline() == aot.MAGIC
        header = json.loads(source.readline())
    assert header["devices"]["count"] == 8 and header["versions"]["jax"] == jax.__version__
    assert header["config"]["experiment"] == "research.distill.vanilla_kd"
    assert sum(header["sizes"].values()) < os.path.getsize(file)


def test_a_program_that_was_only_lowered_is_not_saved(prepared, tmp_path):
    one = measure.measure("eval", prepared.runner, prepared.batches["eval"], chips.parse("h200:8"))
    assert one.compiled is None
    assert launcher.main(["--config", CONFIG, "--topology", "h200:8", "--save", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()
