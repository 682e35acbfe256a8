"""A killed, stopped, damaged or moved run continues as if nothing had happened: done to real processes."""

import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from research.core import writers

SCRIPT = pathlib.Path(__file__).parent / "toy_run.py"
SPEED = ("seconds_per_step", "examples_per_s", "data_wait", "memory_gb")


def start(workdir, *options, **popen) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(workdir), *map(str, options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    return errors


def results(workdir):
    """Final parameters, and per step the metrics that do not measure speed."""
    with np.load(workdir / "params.npz") as data:
        params = [data[key] for key in data.files]
    rows = [row for row in writers.read_rows(workdir) if row["kind"] == "train"]
    keep = lambda name: name != "time" and name.removeprefix("train/") not in SPEED
    return params, [{name: value for name, value in row.items() if keep(name)} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """30 steps without a break on one device."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(folder))
    return results(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed, without warning, at step 17; its newest checkpoint is of step 15."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(folder)
    for line in process.stdout:
        if line == "step 17\n":
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "params.npz").exists()
    return folder


def copy(folder, tmp_path):
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def assert_identical(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert found[1] == expected[1]


def assert_close(found, expected, rtol=2e-5):
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b)))
    assert [row["step"] for row in found[1]] == [row["step"] for row in expected[1]]
    np.testing.assert_allclose(
        [row["train/loss"] for row in found[1]], [row["train/loss"] for row in expected[1]], rtol=rtol
    )


def test_killed_run_resumes_bit_for_bit(killed, straight, tmp_path):
    folder = copy(killed, tmp_path)
    finish(start(folder))
    assert_identical(results(folder), straight)


@pytest.mark.parametrize("options", [("--devices", 4, "--fsdp", 4), ("--devices", 2, "--mode", "pmap")], ids=str)
def test_resumes_on_other_devices(options, killed, straight, tmp_path):
    folder = copy(killed, tmp_path)
    finish(start(folder, *options))
    assert_close(results(folder), straight)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_stop_signal_saves_and_asks_for_a_restart(name, straight, tmp_path):
    errors = finish(start(tmp_path, "--signal-at", 8, "--signal", name), status=42)
    assert "step 8 is saved, exiting with status 42" in errors
    assert (tmp_path / "checkpoints" / "8").is_dir()  # between two regular saves
    finish(start(tmp_path))
    assert_identical(results(tmp_path), straight)


def saved(folder: pathlib.Path) -> list[pathlib.Path]:
    """The finished checkpoints, oldest first."""
    return sorted((p for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_truncated_checkpoint_falls_back_to_the_one_before(killed, straight, tmp_path):
    folder = copy(killed, tmp_path)
    newest = saved(folder)[-1]
    victim = largest(newest)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    errors = finish(start(folder))
    assert f"checkpoint {newest} is damaged" in errors and "using the one before it" in errors
    assert_identical(results(folder), straight)


def test_half_written_checkpoint_is_not_taken(killed, straight, tmp_path):
    folder = copy(killed, tmp_path)
    half = folder / "checkpoints" / "16.orbax-checkpoint-tmp"  # as a save that was cut off leaves it
    shutil.copytree(saved(folder)[-1], half)
    shutil.rmtree(half / "record")
    finish(start(folder))
    assert_identical(results(folder), straight)


def test_no_readable_checkpoint_is_an_error_and_nothing_is_removed(killed, tmp_path):
    folder = copy(killed, tmp_path)
    steps = saved(folder)
    for step in steps:
        largest(step).write_bytes(b"")
    errors = finish(start(folder), status=1)
    assert "is readable; move the folder away to start again" in errors.splitlines()[-1]
    assert all(step.is_dir() for step in steps)


def test_nan_stops_naming_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    errors = finish(start(tmp_path, "--poison", 11), status=1).strip().splitlines()[-1]
    assert "loss became nan at step 12; the last good checkpoint is step 10" in errors
    assert not (tmp_path / "checkpoints" / "12").exists()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_processes_equal_one(straight, tmp_path):
    """2 processes x 2 devices against 1 x 4 (and so against 1 x 1), with a stop agreed on when one of them is told."""
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(one, "--devices", 4, "--fsdp", 2))

    def both(*last):
        share = ["--devices", 2, "--fsdp", 2, "--processes", 2, "--port", free_port()]
        return [start(two, *share, "--process", 0), start(two, *share, "--process", 1, *last)]

    for process in both("--signal-at", 9):
        assert "step 9 is saved" in finish(process, status=42)
    for process in both():
        finish(process)
    assert_close(results(two), results(one), rtol=1e-6)
    assert_close(results(two), straight)
