"""A killed, stopped, damaged or moved run continues as if nothing had happened: done to real processes."""

import pathlib
import shutil
import signal

import pytest

from tests.pod.start import assert_close, assert_identical, finish, results, saved, start


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """30 steps without a break on one device."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(folder))
    return results(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed, without warning, at step 17; its newest checkpoint is of step 15, or 10."""
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


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_truncated_checkpoint_falls_back_to_the_one_before(killed, straight, tmp_path):
    folder = copy(killed, tmp_path)
    newest = folder / "checkpoints" / str(saved(folder)[-1])
    victim = largest(newest)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    errors = finish(start(folder))
    assert f"checkpoint {newest} is damaged" in errors and "using the one before it" in errors
    assert_identical(results(folder), straight)


def test_half_written_checkpoint_is_not_taken(killed, straight, tmp_path):
    folder = copy(killed, tmp_path)
    half = folder / "checkpoints" / "16.orbax-checkpoint-tmp"  # as a save that was cut off leaves it
    shutil.copytree(folder / "checkpoints" / str(saved(folder)[-1]), half)
    shutil.rmtree(half / "record")
    finish(start(folder))
    assert_identical(results(folder), straight)
    assert not half.exists()


def test_no_readable_checkpoint_is_an_error_and_nothing_is_removed(killed, tmp_path):
    folder = copy(killed, tmp_path)
    steps = [folder / "checkpoints" / str(step) for step in saved(folder)]
    for step in steps:
        largest(step).write_bytes(b"")
    errors = finish(start(folder), status=1)
    assert "is readable; move the folder away to start again" in errors.splitlines()[-1]
    assert all(step.is_dir() for step in steps)


def test_nan_stops_naming_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    errors = finish(start(tmp_path, "--poison", 11), status=1).strip().splitlines()[-1]
    assert "loss became nan at step 12; the last good checkpoint is step 10" in errors
    assert not (tmp_path / "checkpoints" / "12").exists()
