"""Starts the toy training as real processes and looks at what they leave."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np

from research.core import writers

SCRIPT = pathlib.Path(__file__).parent / "toy_run.py"
SPEED = ("seconds_per_step", "examples_per_s", "data_wait", "memory_gb")


def start(workdir, *options, env=None) -> subprocess.Popen:
    """A process that trains in `workdir`; `env` is added to the environment."""
    command = [sys.executable, str(SCRIPT), str(workdir), *map(str, options)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=os.environ | (env or {}), **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """What the process wrote to stderr; its exit status is checked."""
    _, errors = process.communicate(timeout=200)
    assert process.returncode == status, errors
    return errors


def reach(process: subprocess.Popen, line: str) -> None:
    """Reads the output up to a line."""
    for found in process.stdout:
        if found == line + "\n":
            return
    raise AssertionError(f"the process ended before {line!r}:\n{process.stderr.read()}")


def until(condition) -> None:
    """Waits for something that other processes bring about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def go_on(process: subprocess.Popen) -> None:
    """Ends a pause."""
    process.stdin.write("\n")
    process.stdin.flush()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def together(workdir, count: int, *options, timeout: float = 60, only=None) -> list[subprocess.Popen]:
    """`count` processes that form one job; `only` gives options of single ones by their index."""
    port = free_port()

    def environment(index):
        job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
        return job | {"JAX_PROCESS_ID": str(index)}

    own = only or {}
    return [
        start(workdir, "--distributed", timeout, *options, *own.get(i, ()), env=environment(i)) for i in range(count)
    ]


def results(workdir):
    """Final parameters, and per step the metrics that do not measure speed."""
    with np.load(workdir / "params.npz") as data:
        params = [data[key] for key in data.files]
    rows = [row for row in writers.read_rows(workdir) if row["kind"] == "train"]
    keep = lambda name: name != "time" and name.removeprefix("train/") not in SPEED
    return params, [{name: value for name, value in row.items() if keep(name)} for row in rows]


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


def saved(folder: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints, oldest first."""
    folder = folder / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.exists() else []
