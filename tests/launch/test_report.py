"""Reports of handmade run folders: the numbers, what is said of unfinished and unfair runs, and the page itself."""

import html.parser
import json
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from launch import report
from research.core import compare, runs, sweeps
from research.core.errors import UserError
from research.core.report import fairness, page, svg, text
from research.core.report import summary as summaries

TOP1 = {"none": [0.90, 0.92, 0.91], "kd": [0.93, 0.94, 0.92], "dkd": [0.95, 0.93, 0.97]}
ENVIRONMENT = {"python": "3.11.9", "packages": {"jax": "0.10.2"}, "command": ["python", "-m", "launch.train"]}


def config(seed, losses, **changes):
    students = {arm: {"model": "mixer", "loss": loss, "loss_weight": 1.0} for arm, loss in losses.items()}
    return {"seed": seed, "batch_size": 32, "optimizer": {"lr": 0.1}, "students": students} | changes


def write(folder, *, seed, top1, finished=True, environment=ENVIRONMENT, **changes):
    """A run folder of the arms in `top1`, with a teacher, two evaluations and the speed of three log rows."""
    folder.mkdir(parents=True)
    losses = {arm: "" if arm == "none" else arm for arm in top1}
    (folder / "config.json").write_text(json.dumps(config(seed, losses, **changes)))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "cost.json").write_text(json.dumps({arm: {"params": 1_234_567, "macs": 4.1e9} for arm in top1}))
    rows = []
    for step, seconds in ((10, 9.0), (20, 0.02), (30, 0.04)):
        losses = {f"train/{arm}/loss": 2.0 / step for arm in top1}
        rows.append({"step": step, "time": 100.0 + step, "kind": "train", "train/seconds_per_step": seconds} | losses)
    for step, share in ((15, 1.02), (30, 1.0)):
        values = {f"eval/{arm}/top1": share * value for arm, value in top1.items()}
        values |= {f"eval/{arm}/loss": 1 - value for arm, value in top1.items()}
        rows.append({"step": step, "time": 100.0 + step, "kind": "eval", "eval/teacher/top1": 0.99} | values)
    if finished:
        rows.append({"step": 30, "time": 131.0, "kind": "done"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def three(tmp_path):
    folder = tmp_path / "three"
    for seed in range(3):
        write(folder / f"seed={seed}", seed=seed, top1={arm: values[seed] for arm, values in TOP1.items()})
    return folder


def test_a_clock_set_back_gives_no_negative_time(tmp_path):
    write(tmp_path / "run", seed=0, top1={"none": 0.9})
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["time"] -= 7200.0 * (row["step"] >= 20)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert runs.read(tmp_path / "run").seconds() == pytest.approx(16.0)  # of 21, as the jump itself is not known


class Reader(html.parser.HTMLParser):
    """Checks that tags close in order and collects links, texts of table cells and identifiers."""

    VOID = {"meta", "br", "link", "img", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.cells, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.links.append(value)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open and "script" not in self.open:
            self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


def arm(summary, label):
    return next(found for found in summary.arms if found.label == label)


def test_values_are_those_of_the_last_evaluation_by_seed(three):
    summary = summaries.collect([three])
    assert [a.label for a in summary.arms] == ["none", "kd", "dkd", "teacher"]
    for label, values in TOP1.items():
        assert arm(summary, label).values("top1") == dict(enumerate(values))
    assert arm(summary, "teacher").reference and summary.baseline.label == "none"
    assert [metric.name for metric in summary.metrics] == ["top1", "loss"]
    assert summary.best(summary.metrics[0]) == ["dkd"] and summary.best(summary.metrics[1]) == ["dkd"]


def test_the_table_holds_mean_and_sample_deviation_and_the_paired_gap(three):
    summary = summaries.collect([three])
    for label, values in TOP1.items():
        row = [cell.text for cell in text.cells(summary, arm(summary, label))]
        mean, std = 100 * np.mean(values), 100 * np.std(values, ddof=1)
        assert row[:2] == ["3", f"{mean:.2f} ± {std:.2f}"]
        if label != "none":
            gaps = 100 * (np.array(values) - np.array(TOP1["none"]))
            assert row[2] == f"{gaps.mean():+.2f} ± {gaps.std(ddof=1):.2f}"
    assert [c.best for c in text.cells(summary, arm(summary, "dkd"))] == [False, True, False, True]
    assert text.cells(summary, arm(summary, "teacher"))[1].text == "99.00"


def test_a_worse_arm_has_a_negative_gap_and_is_not_praised(tmp_path):
    for seed, value in enumerate((0.5, 0.6, 0.55)):
        write(tmp_path / f"seed={seed}", seed=seed, top1={"none": 0.9 + 0.01 * seed, "kd": value})
    summary = summaries.collect([tmp_path])
    assert text.cells(summary, arm(summary, "kd"))[2].text.startswith("−36.00")
    assert "no arm improves on the baseline" in text.headline(summary)


def test_a_gap_is_clear_when_the_t_interval_leaves_out_zero():
    for values in ([0.5, 0.7, 0.9], [0.1, 0.9, 0.2], [-0.5, -0.6, -0.55], [0.3, -0.3]):
        found = compare.statistic(values)
        expected = stats.ttest_1samp(values, 0.0).pvalue < 0.05
        assert text.clear(found) == expected
    assert not text.clear(compare.statistic([1.0]))


def test_unpaired_seeds_give_the_difference_of_means():
    a, b = {0: 1.0, 1: 3.0}, {1: 1.0, 2: 2.0, 3: 3.0}
    found = compare.gap(a, b)
    assert found.mean == 0.0 and found.n == 2
    assert math.isclose(found.std, math.sqrt(statistics.variance([1, 3]) + statistics.variance([1, 2, 3])))
    assert compare.gap({}, b) is None


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.1234, 0.1235], "0.123 ± 0.000"),
        ([12.3, 14.1], "13.2 ± 1.3"),
        ([1234.0, 1250.0], "1242.0 ± 11.3"),
        ([0.5], "0.500"),
        ([0.0, 0.0], "0.0 ± 0.0"),
    ],
)
def test_numbers_show_three_digits(values, shown):
    assert text.value(compare.statistic(values), summaries.Metric("loss", True, False)) == shown


def test_unfinished_missing_and_broken_runs_are_named_and_left_out(three):
    write(three / "seed=3", seed=3, top1={label: 0.1 for label in TOP1}, finished=False)
    with (three / "seed=2" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "ki')
    (three / "seed=0" / "environment.json").write_text("{")
    (three / "seed=4").mkdir()
    (three / "seed=4" / "config.json").write_text(json.dumps(config(4, {"none": "", "kd": "kd", "dkd": "dkd"})))
    summary = summaries.collect([three])
    assert arm(summary, "kd").values("top1") == dict(enumerate(TOP1["kd"]))
    notes = "\n".join(summary.notes)
    assert "seed=3 is not finished (step 30) and is left out of the table" in notes
    assert "seed=2: metrics.jsonl has 1 unreadable line" in notes
    assert "seed=0: environment.json is not JSON" in notes
    assert "seed=4 is not finished (step 0)" in notes and "seed=4: metrics.jsonl is missing" in notes
    Reader(page.page(summary))


def test_nothing_finished_still_makes_a_page(tmp_path, capsys):
    write(tmp_path / "a", seed=0, top1={"none": 0.5, "kd": 0.6}, finished=False)
    assert report.main([str(tmp_path)]) == 0
    assert "No run is finished yet" in capsys.readouterr().out
    read = Reader((tmp_path / "report.html").read_text())
    assert "Curves" in read.text
    assert report.main([str(tmp_path), "--png", str(tmp_path / "x.png")]) == 1
    assert "no run is finished" in capsys.readouterr().err


def test_the_page_is_whole_safe_and_needs_no_network(three, tmp_path, capsys):
    output, picture = tmp_path / "out" / "r.html", tmp_path / "out" / "r.png"
    assert report.main([str(three), "--output", str(output), "--png", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "91.00 ± 1.00" in out and "+4.00 ± 2.65" in out and str(output) in out
    source = output.read_text()
    read = Reader(source)
    assert read.links == [] and "http:" not in source and "https:" not in source and "@import" not in source
    assert "95.00 ± 2.00" in read.cells and "1.23 M" in read.cells and "4.1 G" in read.cells and "30 ms" in read.cells
    assert "A fair comparison" in read.text and source.count("<svg viewBox") == 4
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def test_a_sweep_gives_its_order_and_names_what_has_not_started(tmp_path):
    write(tmp_path / "loss=kd" / "seed=0", seed=0, top1={"kd": 0.6})
    write(tmp_path / "loss=none" / "seed=0", seed=0, top1={"none": 0.5})
    write(tmp_path / "teacher", seed=0, top1={"big": 0.9})
    planned = [sweeps.Planned(f"loss={a}", s, f"loss={a}/seed={s}", {}) for a in ("kd", "none") for s in (0, 1)]
    plan = sweeps.Plan("configs/x.py", (), ("student.loss",), True, tuple(planned))
    sweeps.save(tmp_path, plan, ["python", "-m", "launch.sweep"])
    summary = summaries.collect([tmp_path])
    assert [a.label for a in summary.compared] == ["none, none", "kd, kd"]
    assert summary.notes == ("loss=kd/seed=1 has not started", "loss=none/seed=1 has not started")


def test_names_are_escaped(tmp_path):
    for seed in range(2):
        write(tmp_path / f"{seed}", seed=seed, top1={"none": 0.5, "<script>&": 0.6})
    source = page.page(summaries.collect([tmp_path]))
    Reader(source)
    assert "<script>&" not in source and "&lt;script&gt;&amp;" in source


def test_arms_may_be_runs_of_their_own(tmp_path):
    for loss in ("", "kd"):
        for seed in range(2):
            folder = tmp_path / (loss or "none") / f"seed={seed}"
            write(folder, seed=seed, top1={"a": 0.5 + 0.1 * seed + 0.05 * bool(loss)})
            found = json.loads((folder / "config.json").read_text())
            found["students"]["a"]["loss"] = loss
            (folder / "config.json").write_text(json.dumps(found))
    summary = summaries.collect([tmp_path])
    assert [a.label for a in summary.arms] == ["none", "kd", "teacher"]
    assert summary.differing() == ["student.loss"]
    assert math.isclose(summary.gap(arm(summary, "kd"), summary.primary).std, 0.0, abs_tol=1e-12)


def said(*paths):
    return fairness.statement(summaries.collect(paths))


def test_fair_arms_are_said_to_be(three):
    found = said(three)
    assert found.kind == "comparison" and found.fair
    told = " ".join(line.text for line in found.lines)
    assert "The arms differ in student.loss alone." in told and "side by side" in told and "0, 1, 2" in told
    assert "batch_size" in told and "the rest of student" in told


def test_what_makes_arms_unfair_is_named(tmp_path):
    for seed in range(3):
        write(tmp_path / "a" / f"{seed}", seed=seed, top1={"kd": 0.5}, batch_size=32)
        write(tmp_path / "b" / f"{seed}", seed=seed + (seed == 2), top1={"dkd": 0.5}, batch_size=64)
    found = said(tmp_path)
    assert found.kind == "comparison" and not found.fair
    bad = [line.text for line in found.lines if line.state == "bad"]
    assert "batch_size" in bad[0] and "do not have the same finished seeds" in bad[1]


def test_a_search_is_called_one_and_other_machines_are_named(tmp_path):
    for value in (0.1, 0.2):
        environment = ENVIRONMENT | {"python": f"3.11.{value}"}
        folder = tmp_path / f"lr={value}"
        write(folder, seed=0, top1={"kd": 0.5}, optimizer={"lr": value}, environment=environment)
    found = said(tmp_path)
    assert found.kind == "search"
    told = " ".join(line.text for line in found.lines)
    assert "search over optimizer.lr" in told and "optimistic" in told and "differ in python" in told


def test_a_run_inside_a_run_is_no_arm(three):
    write(three / "seed=0" / "teacher", seed=0, top1={"big": 0.99})
    assert [path.name for path in runs.find([three])] == ["seed=0", "seed=1", "seed=2"]


def test_a_teacher_that_is_trained_is_an_arm(tmp_path):
    write(tmp_path / "a", seed=0, top1={"teacher": 0.98})
    summary = summaries.collect([tmp_path])
    assert [(a.label, a.reference) for a in summary.arms] == [("teacher", False)]
    assert "98.00 % over one seed" in text.headline(summary)


def test_a_further_form_of_an_arm_is_a_row_with_the_options_of_that_arm(tmp_path):
    for seed in range(2):
        write(tmp_path / f"seed={seed}", seed=seed, top1={"deep": 0.5 + seed / 10})
        file = tmp_path / f"seed={seed}" / "metrics.jsonl"
        form = {"step": 30, "time": 130.0, "kind": "eval", "eval/deep_deploy/top1": 0.5 + seed / 10}
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = [row | form if (row["kind"], row["step"]) == ("eval", 30) else row for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summaries.collect([tmp_path])
    assert [found.label for found in summary.compared] == ["deep", "deep_deploy"] and summary.differing() == []
    assert arm(summary, "deep_deploy").values("top1") == arm(summary, "deep").values("top1") == {0: 0.5, 1: 0.6}


def test_folders_are_in_natural_order(tmp_path):
    for seed in (0, 10, 2):
        write(tmp_path / f"seed={seed}", seed=seed, top1={"kd": 0.5})
    assert [path.name for path in runs.find([tmp_path])] == ["seed=0", "seed=2", "seed=10"]


def test_a_resumed_run_counts_each_step_once(tmp_path):
    write(tmp_path / "a", seed=0, top1={"kd": 0.5}, finished=False)
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 30, "time": 140.0, "kind": "eval", "eval/kd/top1": 0.75}) + "\n")
    run = runs.read(tmp_path / "a")
    assert run.last("kd")["top1"] == 0.75 and len([r for r in run.rows if r["step"] == 30]) == 2
    assert run.seconds_per_step() == 0.03 and math.isclose(run.examples_per_second(), 32 / 0.03)


def test_averages_are_metrics_of_their_arm(tmp_path):
    write(tmp_path / "a", seed=0, top1={"kd": 0.5})
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 30, "time": 1.0, "kind": "eval", "eval/ema0.9/kd/top1": 0.6, "eval/kd/top1": 0.5})
        )
    run = runs.read(tmp_path / "a")
    assert sorted(run.arms) == ["kd", "teacher"] and run.last("kd") == {"ema0.9/top1": 0.6, "top1": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "no such run folder"),
        (["."], "no run here"),
        (["three", "--baseline", "x"], "--baseline x: not among the arms none, kd, dkd"),
        (["three", "--metric", "x"], "--metric x: not among the evaluated top1, loss"),
        (["three", "--output", "x.txt"], "must end in .html"),
        (["three", "--outptu", "x.html"], "did you mean --output"),
    ],
)
def test_wrong_arguments_are_one_line(three, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if arguments == ["."] else tmp_path)
    assert report.main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_ticks_are_round_and_inside():
    for low, high in ((0.0, 1.0), (94.3, 96.7), (-3e-5, 4e-5), (1.0, 123456.0)):
        found = svg.ticks(low, high)
        assert 3 <= len(found) <= 9 and low <= found[0] + 1e-9 and found[-1] <= high + 1e-9
        assert np.allclose(np.diff(found), found[1] - found[0])


def test_a_band_is_the_mean_over_runs_and_long_curves_are_binned():
    found = svg.band("a", "s0", [[(1, 1.0), (2, 2.0)], [(1, 3.0), (2, 2.0)]])
    assert found.means == [2.0, 2.0] and found.stds == [pytest.approx(math.sqrt(2)), 0.0]
    long = svg.band("a", "s0", [[(step, float(step)) for step in range(1, 10_001)]])
    assert len(long.steps) <= svg.POINTS and math.isclose(np.mean(long.means[:-1]), np.mean(long.steps[:-1]))


def test_a_broken_folder_says_so(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        runs.read(tmp_path)


@pytest.mark.parametrize(
    ("finished", "sentence"),
    [
        ({"kd": [0.6, 0.7]}, "kd: top1 65.00 ± 7.07 % over 2 seeds; no other arm is finished."),
        ({"kd": [0.6, 0.7], "dkd": [0.7, 0.6]}, "dkd and kd share the best mean top1."),
        (
            {"kd": [0.6], "dkd": [0.7]},
            "dkd has the best mean top1, 70.00 % over one seed; the baseline, none, is not finished.",
        ),
        (
            {"none": [0.7], "dkd": [0.6]},
            "none has the best mean top1, 70.00 % over one seed: no arm improves on the baseline.",
        ),
        (
            {"none": [0.5], "dkd": [0.6]},
            "dkd has the best mean top1, 60.00 % over one seed: +10.00 points over the baseline, none; "
            "one seed cannot tell this gap from zero.",
        ),
    ],
)
def test_the_headline_claims_no_more_than_there_is(tmp_path, finished, sentence):
    for label in ("none", "kd", "dkd"):
        for seed, value in enumerate(finished.get(label, [0.4])):
            write(tmp_path / label / f"{seed}", seed=seed, top1={label: value}, finished=label in finished)
    summary = summaries.collect([tmp_path])
    assert text.headline(summary) == sentence
    Reader(page.page(summary))
