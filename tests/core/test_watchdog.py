"""What counts as progress, and what a hung process leaves: scripts run as processes of their own."""

import subprocess
import sys
import time

import pytest

HEAD = """
import os, signal, subprocess, sys, threading, time
from research.core.watchdog import Watchdog

class Step:
    def __init__(self): self.done = False
    def is_ready(self): return self.done

def finished(watch, count):
    for step in range(1, count + 1):
        result = Step()
        watch.dispatched(step, result)
        time.sleep(0.1)
        result.done = True

def stop_for_two_seconds():
    subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)

never = threading.Event()
"""


def run(body: str, folder) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", HEAD + body, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_step_that_never_finishes_ends_the_process(tmp_path):
    body = "with Watchdog(0.5, sys.argv[1]) as w:\n finished(w, 8)\n w.dispatched(9, Step())\n never.wait()"
    done = run(body, tmp_path)
    assert done.returncode == 42
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("hung: no step finished for 0") or message.startswith("hung: no step finished for 1")
    assert "(the last one was step 8)" in message and message.endswith("exiting with status 42")
    stacks = (tmp_path / "stacks-0.txt").read_text()
    assert message in stacks and stacks.count("Thread 0x") + stacks.count("Current thread 0x") >= 2
    assert "in wait" in stacks


def test_input_that_never_comes_ends_the_process(tmp_path):
    done = run("with Watchdog(0.3, sys.argv[1]) as w:\n finished(w, 3)\n never.wait()", tmp_path)
    assert done.returncode == 42 and "the last one was step 3" in done.stderr


def test_running_ahead_of_the_devices_is_no_progress(tmp_path):
    body = "with Watchdog(0.3) as w:\n finished(w, 2)\n for n in range(3, 100):\n  w.dispatched(n, Step())\n"
    done = run(body + "  never.wait(0.1)", tmp_path)
    assert done.returncode == 42 and "the last one was step 2" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "work",
    [
        "never.wait(1.2); finished(w, 1)",  # compiling
        "finished(w, 1)\n with w.slow('saving'): never.wait(1.2)",
        "finished(w, 1)\n for _ in w.each(range(8)): never.wait(0.2)",
        "finished(w, 12)",
        "finished(w, 1); stop_for_two_seconds(); finished(w, 2)",
    ],
    ids=["first step", "saving", "evaluation batches", "steps", "a stopped process"],
)
def test_what_takes_its_time_is_let_be(work, tmp_path):
    done = run(f"with Watchdog(0.5) as w:\n {work}\nprint('through')", tmp_path)
    assert (done.returncode, done.stdout) == (0, "through\n"), done.stderr


def test_even_what_may_take_its_time_has_a_limit(tmp_path):
    done = run("with Watchdog(0.1) as w:\n finished(w, 1)\n with w.slow('evaluating'): never.wait()", tmp_path)
    assert done.returncode == 42 and "while evaluating" in done.stderr


def test_off_by_default_and_ended_with_its_context(tmp_path):
    began = time.monotonic()
    body = "with Watchdog() as w: w.dispatched(1, Step())\nwith Watchdog(60): pass\nprint(threading.active_count())"
    done = run(body, tmp_path)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert time.monotonic() - began < 30
