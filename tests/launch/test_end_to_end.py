"""A sweep of real trainings, resumed, and its report."""

import json
import pathlib
import re

from launch import report, sweep
from research.core import runs

CONFIG = str(pathlib.Path(__file__).parent / "tiny.py")


def test_sweep_trains_what_is_missing_and_is_reported(tmp_path, capfd):
    base = ["--config", CONFIG, "--workdir", str(tmp_path), "--config.steps=2"]
    assert sweep.main([*base, "--sweep.seed=0"]) == 0
    first = (tmp_path / "seed=0" / "metrics.jsonl").read_bytes()
    assert sweep.main([*base, "--sweep.seed=0,1"]) == 0
    assert (tmp_path / "seed=0" / "metrics.jsonl").read_bytes() == first  # finished runs are left alone
    found = [runs.read(folder) for folder in runs.find([tmp_path])]
    assert [run.seed for run in found] == [0, 1] and all(run.finished for run in found)

    assert report.main([str(tmp_path), "--output", str(tmp_path / "r.html"), "--png", str(tmp_path / "r.png")]) == 0
    values = [run.last("small")["top1"] for run in found]
    shown = capfd.readouterr().out
    assert f"{100 * sum(values) / 2:.2f}" in shown
    page = (tmp_path / "r.html").read_text()
    assert "small" in page and not re.search(r'(src|href)="https?:', page)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_run_does_not_stop_the_others(tmp_path, capfd):
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"optimizer.lr": 1e38, "optimizer.name": "sgd"}, {"optimizer.lr": 0.001}]))
    options = ["--list", str(listed), "--sweep.seed=0", "--config.steps=3"]
    assert sweep.main(["--config", CONFIG, "--workdir", str(tmp_path / "s"), *options]) == 1
    text = capfd.readouterr().out
    assert "FAILED" in text and "at step" in text
    assert sorted(run.finished for run in map(runs.read, runs.find([tmp_path / "s"]))) == [False, True]
