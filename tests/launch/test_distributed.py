"""launch.train as several processes: the same run folder as one process makes, weights, report and sweep included."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from launch import report
from research.core import runs
from research.port import tensors

CONFIG = str(pathlib.Path(__file__).parent / "tiny.py")
# Wide enough that fsdp splits the kernels over both processes; 355 test images divide by nothing used here.
# (Adam would turn rounding errors of a gradient that is zero by symmetry into whole steps.)
OPTIONS = ("--config.students.small.options.embed_dim=64", "--config.parallel.axes.fsdp=4")
OPTIONS += ("--config.optimizer.name=nesterov", "--config.optimizer.lr=0.1")
RULES = "--config.parallel.rules=[['.*', 'fsdp']]"


def start(workdir, *options, devices: int, **environment) -> subprocess.Popen:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last counts
    env = os.environ | {"XLA_FLAGS": flags} | {name: str(value) for name, value in environment.items()}
    command = [sys.executable, "-m", "launch.train", "--config", CONFIG, "--workdir", str(workdir), *OPTIONS, RULES]
    return subprocess.Popen([*command, *options], env=env, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def together(workdir, count: int, *options) -> None:
    """Trains as `count` processes that find each other by the environment; four devices in all."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    names = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=count)
    all_of = [
        start(workdir, "--distributed", *options, devices=4 // count, JAX_PROCESS_ID=index, **names)
        for index in range(count)
    ]
    for process in all_of:
        finish(process)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same run by one, two and four processes."""
    root = tmp_path_factory.mktemp("runs")
    finish(start(root / "1", devices=4))
    together(root / "2", 2)
    together(root / "4", 4)
    return root


@pytest.mark.parametrize("count", ["2", "4"])
def test_weights_and_metrics_are_those_of_one_process(folders, count):
    one, several = runs.read(folders / "1"), runs.read(folders / count)
    assert several.finished and not several.problems
    weights = [tensors.read(folders / name / "weights" / "small.safetensors") for name in ("1", count)]
    assert weights[0].keys() == weights[1].keys()
    for name, expected in weights[0].items():
        np.testing.assert_allclose(weights[1][name], expected, rtol=1e-5, atol=1e-7)
    for key, points in one.series.items():
        if key[2] in ("loss", "top1", "top5", "grad_norm"):
            np.testing.assert_allclose(several.series[key], points, rtol=1e-6)
    assert one.last("small")["top1"] == several.last("small")["top1"]  # a count over 355 images
    assert several.environment["processes"] == int(count)


def test_the_report_is_that_of_one_process(folders, tmp_path, capsys):
    tables = []
    for count in "12":
        assert report.main([str(folders / count), "--output", str(tmp_path / "report.html")]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]  # after the folder's name
        tables.append([line for line in lines if not line.rstrip().endswith(" s")])  # all but what it took
    assert tables[0] == tables[1] and any("small" in line for line in tables[0])
