"""A run's history: no row lost or doubled over restarts, and readable by other tools."""

import io
import json

import pytest
from tensorboardX.proto import event_pb2

from research.core import environment, writers
from research.core.writers import Writer, read_rows


class Terminal(io.StringIO):
    def isatty(self):
        return True


def writer(folder, **options):
    return Writer(
        folder, **{"steps": 100, "batch_size": 8, "tensorboard": False, "stream": io.StringIO(), "every": 0.0} | options
    )


def train(w, *steps, loss=1.0):
    for step in steps:
        w.train(step, {"loss": loss, "lr": 0.1}, seconds=2.0, steps=10, waited=0.5)


def test_rows(tmp_path):
    w = writer(tmp_path, flops_per_example=5.0, peak_flops=400.0)
    w.resume(0)
    train(w, 10)
    w.eval(10, {"student/top1": 0.5})
    w.done({"student/top1": 0.25})
    rows = read_rows(tmp_path)
    assert [(row["step"], row["kind"]) for row in rows] == [(10, "train"), (10, "eval"), (100, "done")]
    speed = {"train/examples_per_s": 40, "train/seconds_per_step": 0.2, "train/data_wait": 0.25, "train/mfu": 0.5}
    assert speed.items() <= rows[0].items() and rows[0]["train/loss"] == 1.0 and 0 < rows[0]["train/memory_gb"] < 1000
    assert rows[1]["eval/student/top1"] == 0.5 and rows[2]["eval/student/top1"] == 0.25
    assert all(abs(row["time"] - rows[0]["time"]) < 60 for row in rows)


def test_resume_drops_what_was_not_saved(tmp_path):
    w = writer(tmp_path)
    w.resume(0)
    train(w, 10, 20, 30)
    w.eval(20, {"top1": 0.1})
    w.close()
    w = writer(tmp_path)
    w.resume(20)
    train(w, 30, 40, loss=2.0)
    assert [(row["step"], row.get("train/loss")) for row in read_rows(tmp_path)] == [
        (10, 1.0),
        (20, 1.0),
        (20, None),
        (30, 2.0),
        (40, 2.0),
    ]


def test_resuming_a_finished_run_leaves_one_end(tmp_path):
    for _ in range(2):
        w = writer(tmp_path, steps=10)
        w.resume(0)
        train(w, 10)
        w.done({"top1": 1.0})
        w = writer(tmp_path, steps=10)
        w.resume(10)
        w.done({"top1": 1.0})
        assert [row["kind"] for row in read_rows(tmp_path)] == ["train", "done"]


def test_a_torn_line_is_left_out_and_a_damaged_one_is_an_error(tmp_path):
    w = writer(tmp_path)
    train(w, 10, 20)
    w.close()
    file = tmp_path / writers.FILE
    file.write_text(file.read_text()[:-9])
    assert [row["step"] for row in read_rows(tmp_path)] == [10]
    w = writer(tmp_path)
    w.resume(10)
    train(w, 20)
    w.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [10, 20]
    file.write_text("{torn\n" + file.read_text())
    with pytest.raises(ValueError, match="metrics.jsonl: line 1"):
        read_rows(tmp_path)


def test_not_finite_is_null_in_strict_json(tmp_path):
    w = writer(tmp_path)
    train(w, 10, loss=float("nan"))
    w.close()
    (line,) = (tmp_path / writers.FILE).read_text().splitlines()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["train/loss"] is None


def test_plain_lines_state_speed_and_eta(tmp_path):
    out = io.StringIO()
    w = writer(tmp_path, stream=out, flops_per_example=5.0, peak_flops=400.0)
    train(w, 10)
    w.eval(10, {"top1": 0.5})
    first, second = out.getvalue().splitlines()
    for part in ("step 10/100", "loss 1", "lr 0.1", "40 examples/s", "MFU 50 %", "GB", "ETA 00:18"):
        assert part in first
    assert "evaluation" in second and "top1 0.5" in second


def test_plain_lines_keep_their_distance_but_never_miss_the_end(tmp_path):
    out = io.StringIO()
    train(writer(tmp_path, stream=out, every=1000.0), 10, 20, 30, 100)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["10/100", "100/100"]


def test_a_terminal_gets_a_bar(tmp_path):
    out = Terminal()
    w = writer(tmp_path, stream=out)
    w.resume(20)
    train(w, 60)
    w.eval(60, {"top1": 0.5})
    w.done({})
    assert "60/100" in out.getvalue() and "loss 1" in out.getvalue() and "evaluation" in out.getvalue()


def events(folder):
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            yield event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard_events_hold_the_same_values(tmp_path):
    w = writer(tmp_path, tensorboard=True)
    train(w, 10)
    w.eval(10, {"top1": 0.5})
    w.close()
    found = {v.tag: (e.step, v.simple_value) for e in events(tmp_path) for v in e.summary.value}
    assert found["train/loss"] == (10, 1.0) and found["eval/top1"] == (10, 0.5)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.jax, "process_index", lambda: 1)
    w = writer(tmp_path / "run")
    w.resume(0)
    train(w, 10)
    w.eval(10, {})
    w.done({})
    environment.write(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_environment_names_versions_devices_and_no_home(tmp_path, monkeypatch):
    home = tmp_path / "home" / "someone"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python", "-m", "launch.train", f"--workdir={home}/runs/a"])
    environment.write(tmp_path / "run")
    text = (tmp_path / "run" / "environment.json").read_text()
    found = json.loads(text)
    assert str(home) not in text and found["command"][1:] == ["-m", "launch.train", "--workdir=~/runs/a"]
    assert found["devices"] == {"cpu": 8} and {"jax", "flax", "numpy"} <= set(found["packages"])
    assert found["commit"] is None or len(found["commit"].rstrip("+")) == 40
