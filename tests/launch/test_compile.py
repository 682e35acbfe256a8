"""The command: its verdicts and exit statuses, without data, weights or accelerators."""

import json
import re
import shlex

import pytest

from launch import compile as launcher
from research.core import config as configs
from research.core.errors import UserError

TINY = ["--config", "tests/launch/tiny.py", "--config.eval.batch_size=16"]
LARGE = "--config.students.small.options.embed_dim=4096"  # 1.6 GiB of state; a virtual device has 2 GiB


def run(capsys, *arguments):
    status = launcher.main([*TINY, *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_fits_and_says_why(capsys):
    status, out, _ = run(capsys, "--topology", "cpu:8")
    assert status == launcher.FITS
    for text in (
        "Memory of one device",
        "activations and temporaries",
        "bottleneck",
        "MFU",
        "Collectives of the train",
    ):
        assert text in out
    assert "all-reduce" in out and "params/small/model" in out and out.strip().splitlines()[-1].startswith("FITS: ")


def test_json_is_the_last_line(capsys):
    status, out, _ = run(capsys, "--topology", "cpu:2x4", "--train-only", "--json")
    found = json.loads(out.strip().splitlines()[-1])
    assert status == 0 and found["fits"] is True and found["suggestions"] == []
    assert found["topology"] == "cpu:2x4" and found["hosts"] == 4 and found["examples"] == 16
    assert found["peak_bytes"] == sum(found["memory"].values()) < found["hbm_bytes"]
    slowest = max(found[f"{key}_seconds"] for key in ("compute", "memory", "network", "cycles"))
    assert found["step_seconds"] == slowest and 0 < found["mfu"] < 1


def test_out_of_memory_suggests(capsys):
    status, out, _ = run(capsys, "--topology", "cpu:8", "--train-only", "--json", LARGE)
    found = json.loads(out.strip().splitlines()[-1])
    assert status == launcher.OUT_OF_MEMORY and found["fits"] is False
    assert "--config.parallel.axes.fsdp=2" in found["suggestions"][0]


def test_fit_finds_one_that_can_be_trained(capsys):
    status, out, _ = run(capsys, "--topology", "cpu:8", "--train-only", "--fit", LARGE)
    lines = out.strip().splitlines()
    assert status == launcher.FITS and lines[-2].startswith("FITS: ")
    with_line = lines[-1].removeprefix("with ")
    status, out, _ = run(capsys, "--topology", "cpu:8", "--train-only", LARGE, *shlex.split(with_line))
    assert status == launcher.FITS


def test_compare_prints_ratios(capsys):
    status, out, _ = run(capsys, "--topology", "cpu:8", "--train-only", "--compare", "tests/launch/tiny.py")
    row = next(line for line in out.splitlines() if "peak memory" in line)
    assert status == 0 and row.split()[-1] == "1.00"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology", "v5e:16x15"], "did you mean v5e:16x16"),
        (["--topology", "cpu:8", "--config.batch_size=12"], "batch_size: 12 is not divisible by 8"),
        (["--topology", "cpu:8", "--config.parallel.mode=pmap"], "only 'jit' compiles ahead"),
        (["--topology", "cpu:8", "--save", "x", "--train-only"], "leave out --train-only"),
        (["--topolgy", "cpu:8"], "the following arguments are required|--topology"),
        (["--topology", "cpu:8", "--config.optimizer.lrr=1"], "did you mean --config.optimizer.lr"),
    ],
)
def test_mistakes_end_with_one_line(capsys, arguments, message):
    try:
        status, _, err = run(capsys, *arguments)
    except SystemExit as stop:
        status, err = stop.code, capsys.readouterr().err
    assert status in (1, 2)
    assert re.search(message, err)


def config(*overrides):
    return configs.load("configs/distill/vanilla_kd_r50_a2.py", ["--config.data.path=/nowhere", *overrides])


def test_data_need_not_be_there():
    assert len(launcher.find_data(config(), 0).train) == 1281167
    assert len(launcher.find_data(config(), 5000).train) == 5000
    assert len(launcher.find_data(config("--config.data.num_examples=77"), 0).train) == 77


def test_unknown_sizes_name_the_option():
    with pytest.raises(UserError, match=r"data\.num_classes: not set, and the data is not here"):
        launcher.find_data(config("--config.data.num_classes=0"), 0)
    with pytest.raises(UserError, match="--examples: give the number of training examples"):
        launcher.find_data(config("--config.data.num_classes=10"), 0)
    with pytest.raises(UserError, match=r"data\.kind: no kind 'foldr'"):
        launcher.find_data(config("--config.data.kind=foldr"), 0)
