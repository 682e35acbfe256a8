"""Several processes are one run: same results on any number of them, and what happens when one of them is lost."""

import signal
import time

import pytest

from research.core import writers
from tests.pod.start import assert_close, finish, free_port, reach, results, saved, start, together

EXAMPLES = 37  # divides into no batch, device or process


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """30 steps and an evaluation on one device."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(folder, "--examples", EXAMPLES))
    return folder


def evaluation(folder) -> list[dict]:
    return [{"step": r["step"], "top1": r["eval/top1"]} for r in writers.read_rows(folder) if r["kind"] == "eval"]


def assert_same(folder, alone):
    assert_close(results(folder), results(alone))
    assert evaluation(folder) == evaluation(alone) and evaluation(alone)[0]["step"] == 30


def test_four_two_and_one_process_are_one_run(alone, tmp_path):
    """Two processes, stopped by a signal to one of them; then one; then four: the data keep their order."""
    for process in together(tmp_path, 2, "--devices", 2, "--fsdp", 2, only={1: ("--signal-at", 9)}):
        assert "step 9 is saved" in finish(process, status=42)
    assert "step 17 is saved" in finish(start(tmp_path, "--devices", 2, "--signal-at", 17), status=42)
    for process in together(tmp_path, 4, "--examples", EXAMPLES):
        finish(process)
    assert_same(tmp_path, alone)


def lose(folder, victim: int, number: signal.Signals, *options, timeout: float) -> tuple[str, float]:
    """Two processes of which one is lost at step 12: what the other wrote, and the seconds until it ended."""
    processes = together(folder, 2, *options, timeout=timeout)
    reach(processes[0], "step 12")
    processes[victim].send_signal(number)
    began = time.monotonic()
    errors = finish(processes[1 - victim], status=42)
    ended = time.monotonic() - began
    processes[victim].kill()
    processes[victim].communicate()
    assert saved(folder)[-1] in (5, 10)  # the save of step 10 may have been under way
    return errors, ended


def test_killed_process_ends_the_others_and_a_restart_goes_on_exactly(alone, tmp_path):
    errors, _ = lose(tmp_path, 1, signal.SIGKILL, timeout=60)
    assert "lost another process" in errors and "exiting with status 42" in errors
    for process in together(tmp_path, 2, "--examples", EXAMPLES):
        finish(process)
    assert_same(tmp_path, alone)


def test_killed_coordinator_ends_the_others(tmp_path):
    errors, _ = lose(tmp_path, 0, signal.SIGKILL, timeout=60)
    assert "lost another process" in errors and "exiting with status 42" in errors


def test_silent_process_is_lost_after_the_timeout(tmp_path):
    """A stopped process keeps its connections: only its heartbeats are missing."""
    errors, ended = lose(tmp_path, 1, signal.SIGSTOP, timeout=3)
    assert "lost another process: JAX gave up on the job; exiting with status 42" in errors
    assert ended < 3 + 10


def test_hung_collective_ends_with_the_stacks_of_all_threads(tmp_path):
    errors, ended = lose(tmp_path, 1, signal.SIGSTOP, "--watch", 3, timeout=100)
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert "hung: no step finished for 3 s (the last one was step 12" in errors and str(tmp_path) in errors
    assert "loop.py" in stacks and "toy_run.py" in stacks
    assert ended < 3 + 10


def test_a_bug_in_one_process_is_its_status_and_the_others_ask_for_a_restart(tmp_path):
    first, second = together(tmp_path, 2, only={1: ("--raise-at", 12)}, timeout=60)
    assert "ZeroDivisionError: a bug" in finish(second, status=1)
    assert "exiting with status 42" in finish(first, status=42)


def test_processes_that_never_come_are_not_waited_for_for_ever(tmp_path):
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    alone = start(tmp_path, "--distributed", 60, "--patience", 2, env=job | {"JAX_PROCESS_ID": "0"})
    errors = finish(alone, status=42)
    assert "not all processes appeared within 2 s" in errors, errors
