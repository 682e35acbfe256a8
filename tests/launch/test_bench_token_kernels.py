"""`bench token_kernels`: what it reads of libtpu's schedules, and what it refuses."""

import importlib.util
import os
import subprocess
import sys

import pytest

from launch import bench_token_kernels
from research.core.errors import UserError


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_small_op_is_expected_to_take_cycles_in_both_forms():
    """In a process of its own, which starts another one."""
    words = "token_kernels --aot v5e:2x2 --op token_select --batch 8 --tokens 17 --width 128 --heads 2 --remove 5"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench", *words.split()], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "token_select" in line)
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells[1] == "v5e:2x2" and int(cells[3]) > 0  # XLA sorts
    assert all(float(cell) > 0 for cell in (cells[2], *cells[4:]))


@pytest.mark.parametrize(
    "words,message",
    [
        ("--aot h100:8", "ahead of time for TPUs, not for cuda"),
        ("--heads 5", "--width 384 does not divide"),
        ("--remove 99", "between 1 and half of the 196 patches"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        bench_token_kernels.checked(bench_token_kernels.parser().parse_args(words.split()))
