"""Reports of distillation: arms of one run, and runs of one arm, show the same; measured steps where there are some."""

import json

import jax
import pytest

from launch import bench_distill, report, sweep, train
from research.core import config as configs
from research.core import sweeps
from research.core.report import costs, measured, text
from research.core.report import summary as summaries

CONFIG = "tests/launch/tiny_pair.py"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """All arms side by side in one run."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        _on_one_device(patch)
        train.run(configs.load(CONFIG), folder)
    return folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """A sweep in which each loss is a run of its own."""
    folder = tmp_path_factory.mktemp("apart")
    points = sweeps.grid({"students.small.loss": ["", "kd"], "seed": ["0"]})
    plan = sweeps.plan(f"{CONFIG}:one", points)
    sweeps.save(folder, plan, ["python", "-m", "launch.sweep"])
    with pytest.MonkeyPatch.context() as patch:
        _on_one_device(patch)
        for run in plan.runs:
            train.run(configs.load(plan.config, sweeps.overrides(run.overrides)), folder / run.folder)
    return folder


def _on_one_device(patch):
    bind = train.runner.build
    patch.setattr(train.runner, "build", lambda e, **o: bind(e, **{"devices": jax.devices()[:1], **o}))


@pytest.fixture
def timed(monkeypatch):
    """Counts the measurements made, of one round."""
    made = []
    monkeypatch.setattr(report, "ROUNDS", 1)
    monkeypatch.setattr(report, "STEPS", 1)
    measure = bench_distill.measure

    def counted(config, *rest):
        made.append(sorted(config.students))
        return measure(config, *rest)

    monkeypatch.setattr(bench_distill, "measure", counted)
    return made


def column(summary, name):
    """Arm -> its text in a column of the costs."""
    found = costs.costs(summary)
    place = found.head.index(name)
    return {arm.label: row[place] for arm, row in zip(summary.arms, found.rows, strict=True)}


def test_both_forms_show_the_same(together, apart):
    one, many = summaries.collect([together]), summaries.collect([apart])
    assert {arm.label for arm in one.compared} == {"none", "kd", "cc"} and one.baseline.label == "none"
    assert {arm.label for arm in many.compared} == {"none", "kd"} and many.baseline.label == "none"
    heads = ["n", "top1 %", "over none", "top5 %", "ece ↓", "agreement %", "loss ↓"]
    assert text.columns(one) == text.columns(many) == heads
    # Equal data, order and initial weights: an arm alone learns what it learns in company.
    for label in ("none", "kd"):
        own, other = ([c.text for c in text.cells(s, _arm(s, label))] for s in (one, many))
        assert own == other
    assert "side by side" in costs.costs(one).note and "side by side" not in costs.costs(many).note


def _arm(summary, label):
    return next(arm for arm in summary.arms if arm.label == label)


def test_a_sweep_reports_what_it_ran(apart, capsys):
    axes = ["--sweep.students.small.loss=,kd", "--sweep.seed=0"]
    assert sweep.main(["--config", f"{CONFIG}:one", "--workdir", str(apart), *axes, "--report"]) == 0
    shown = capsys.readouterr().out
    assert "2 runs, 2 finished" in shown and "agreement" in shown and "ece" in shown
    assert (apart / "report.html").is_file()


def test_steps_are_measured_once_and_shown_by_terminal_and_page(together, timed, capsys):
    for _ in range(2):
        assert report.main([str(together), "--measure"]) == 0
    assert timed == [["cc", "kd", "none"]]
    out, summary = capsys.readouterr().out, summaries.collect([together])
    source = (together / "report.html").read_text()
    for name in ("own step", "of it losses", "extra parameters", "ece"):
        assert name in out and name in source
    assert all(column(summary, "own step")[arm].endswith("s") for arm in ("none", "kd", "cc"))
    assert column(summary, "own step")["teacher"] == ""
    assert column(summary, "of it losses")["none"] == "0 %" and column(summary, "memory of losses")["none"] == "0 MB"
    # Embeddings of 8 and of 12 features to 4, with biases.
    assert column(summary, "extra parameters") == {"none": "0", "kd": "0", "cc": "88", "teacher": ""}


def test_a_measurement_is_found_by_what_the_cost_depends_on(together):
    config = configs.plain(configs.load(CONFIG))
    row = (measured.identity(config, "kd"), measured.Measured("here", "today", 1.0, 0.5, 0.1, 10, 0))
    for same in ({"seed": 3}, {"optimizer": {}}):
        assert measured.lookup([row], config | same, "kd") is row[1]
    for other in ({"batch_size": 3}, {"augment": {"size": 3}}, {"teacher": {"model": "resnet8"}}):
        assert measured.lookup([row], config | other, "kd") is None
    assert measured.lookup([row], config, "none") is None and measured.lookup([row], {}, "kd") is None


def test_runs_without_students_and_broken_files_are_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert report.main([str(tmp_path), "--measure"]) == 1
    assert "has no students" in capsys.readouterr().err
    (tmp_path / measured.FILE).write_text(json.dumps([{"of": {}}]))
    assert report.main([str(tmp_path)]) == 1
    assert "delete it and measure again" in capsys.readouterr().err
