"""A full disk, a store that fails or is slow, a clock that jumps: done to real processes on a small file system."""

import os
import shutil
import subprocess

import pytest

from research.core import writers
from tests.pod.start import assert_identical, finish, go_on, reach, results, saved, start, together, until

SIZE = 3 << 20  # bytes of the file system: room for several checkpoints of the toy


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """30 steps without a break."""
    folder = tmp_path_factory.mktemp("straight")
    finish(start(folder))
    return results(folder)


@pytest.fixture
def disk(tmp_path):
    """A folder that is a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs"]
    if os.geteuid() or subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here; it needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk, leave: int) -> None:
    """Fills the file system up to `leave` bytes."""
    with (disk / "filling").open("ab") as file:
        while (free := shutil.disk_usage(disk).free) > leave:
            file.write(bytes(min(free - leave, 1 << 16)))
            file.flush()


def switch(disk, mode: str) -> None:
    """Makes the file system read-only ("ro") or writable ("rw"), as soon as nothing is being written."""
    command = ["mount", "-o", f"remount,{mode}", str(disk)]
    until(lambda: subprocess.run(command, capture_output=True).returncode == 0)


def linked(run, disk):
    """A run folder whose checkpoints alone are on the small file system."""
    run.mkdir()
    (run / "checkpoints").symlink_to(disk, target_is_directory=True)
    return run


def told(errors: str) -> str:
    """The one message of the run; threads of Orbax and TensorStore may complain beside it as they end."""
    (message,) = (line for line in errors.splitlines() if line.startswith("toy_run: "))
    return message


def test_full_disk(disk, straight, tmp_path):
    run = linked(tmp_path / "run", disk)
    process = start(run, "--pause-at", 13)
    reach(process, "paused")
    until(lambda: 10 in saved(run))
    fill(disk, leave=60_000)
    go_on(process)
    errors = finish(process, status=1)
    message = told(errors)
    assert "the checkpoint of step 15 could not be written" in message and "no space left" in message
    assert "bytes, " in message and "are left; the last good checkpoint is step 10" in message
    assert "/research/" not in errors  # no frame of ours
    assert [p.name for p in disk.iterdir() if "tmp" in p.name] == []
    assert saved(run)[-1] == 10
    assert "no space left" in finish(start(run), status=1)  # still full: the same message, and nothing is lost
    assert saved(run)[-1] == 10
    (disk / "filling").unlink()
    finish(start(run))
    assert_identical(results(run), straight)


def test_failing_store_is_tried_again(disk, straight, tmp_path):
    """The store refuses one save; the next one is written, and the run does not stop."""
    run = linked(tmp_path / "run", disk)
    process = start(run, "--pause-at", 13, 18)
    reach(process, "paused")
    until(lambda: 10 in saved(run))
    switch(disk, "ro")
    go_on(process)
    reach(process, "paused")
    assert saved(run)[-1] == 10
    switch(disk, "rw")
    go_on(process)
    errors = finish(process)
    assert "the checkpoint of step 15 could not be written" in errors and "tried again with the next one" in errors
    assert "Read-only file system" in errors and "step 20 could" not in errors
    assert saved(run) == [25, 30]
    assert_identical(results(run), straight)


def test_store_that_keeps_failing_ends_the_run(disk, straight, tmp_path):
    run = linked(tmp_path / "run", disk)
    process = start(run, "--pause-at", 8)
    reach(process, "paused")
    until(lambda: 5 in saved(run))
    switch(disk, "ro")
    go_on(process)
    message = told(finish(process, status=1))
    assert "the checkpoint of step 20 could not be written" in message and "3 times in a row" in message
    assert "the last good checkpoint is step 5" in message and saved(run) == [5]
    switch(disk, "rw")
    finish(start(run))
    assert_identical(results(run), straight)


def test_last_save_is_tried_again_and_its_failure_is_the_status(disk, straight, tmp_path):
    run = linked(tmp_path / "run", disk)
    process = start(run, "--pause-at", 28)
    reach(process, "paused")
    until(lambda: 25 in saved(run))
    switch(disk, "ro")
    go_on(process)
    message = told(finish(process, status=1))
    assert "the checkpoint of step 30 could not be written" in message
    assert "the last good checkpoint is step 25" in message
    assert not (run / "params.npz").exists()
    switch(disk, "rw")
    finish(start(run))
    assert_identical(results(run), straight)


def test_store_that_fails_one_of_two_processes_restarts_both(disk, tmp_path):
    run = linked(tmp_path / "run", disk)
    processes = together(run, 2, only={0: ("--pause-at", 13)})
    reach(processes[0], "paused")
    until(lambda: 10 in saved(run))
    switch(disk, "ro")
    go_on(processes[0])
    assert "the checkpoint of step 15 could not be written" in finish(processes[0], status=42)
    finish(processes[1], status=42)
    switch(disk, "rw")
    for process in together(run, 2):
        finish(process)
    assert saved(run) == [25, 30]


def test_slow_store_does_not_stop_training(straight, tmp_path):
    process = start(tmp_path, "--slow-store", 1.5)
    reach(process, "step 9")
    assert saved(tmp_path) == []  # four steps were taken while the checkpoint of step 5 is being written
    errors = finish(process)
    assert "for the checkpoint of step 5 to be written" in errors
    assert saved(tmp_path) == [25, 30]
    assert_identical(results(tmp_path), straight)


@pytest.mark.parametrize("jump", [7 * 3600, -7 * 3600], ids=["forward", "back"])
def test_clock_jump(jump, straight, tmp_path):
    """The wall clock is set by hours in the middle of a run that is then stopped and resumed."""
    assert "step 17 is saved" in finish(start(tmp_path, "--clock", 8, jump, "--signal-at", 17), status=42)
    assert saved(tmp_path)[-1] == 17
    finish(start(tmp_path))
    assert_identical(results(tmp_path), straight)
    rows = writers.read_rows(tmp_path)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    speeds = [row["train/seconds_per_step"] for row in rows if row["kind"] == "train"]
    assert all(0 < value < 600 for value in speeds)
