"""Sweeps: plans, fairness, resuming, and running with a small trainer of the same command line."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from launch import sweep
from research.core import sweeps
from research.core.errors import UserError

CONFIG = """
    from ml_collections import ConfigDict

    def get_config(arg):
        config = ConfigDict(dict(
            seed=0, batch_size=8, betas=(0.9, 0.99), student=dict(model="a", loss="kd", loss_weight=1.0),
            optimizer=dict(lr=0.1), log=dict(every=1),
        ))
        if arg == "own":
            config.method_keys = ("optimizer.*",)
        config.warmup = config.get_ref("batch_size") * 2
        return config
"""

# Takes the options of launch.train, claims its folder as launch.train does, and logs a few rows.
TRAINER = """
    import argparse, json, pathlib, signal, sys, time
    from research.core import config as configs
    from research.core.errors import cli

    @cli
    def main(argv):
        parser = argparse.ArgumentParser()
        parser.add_argument("--config"), parser.add_argument("--workdir")
        options, overrides = configs.parse_args(parser, argv)
        config = configs.load(options.config, overrides)
        configs.claim(options.workdir, config)
        if config.student.loss == "broken":
            raise ValueError("student.loss: broken")
        if config.student.loss == "slow":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
            print("waiting")
            time.sleep(60)
        with open(pathlib.Path(options.workdir) / "metrics.jsonl", "a") as file:
            for kind in ("train", "eval", "done"):
                file.write(json.dumps({"step": 1, "time": 0.0, "kind": kind, "eval/top1": 0.5}) + "\\n")
        print("trained", config.student.loss, config.seed)
        return 0

    sys.exit(main())
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(textwrap.dedent(CONFIG))
    return str(path)


@pytest.fixture
def trainer(tmp_path):
    path = tmp_path / "trainer.py"
    path.write_text(textwrap.dedent(TRAINER))
    return (sys.executable, str(path))


def points(*texts):
    return sweep.points([f"--sweep.{text}" for text in texts], None)


def test_a_grid_is_the_product_of_its_axes_with_brackets_kept_together():
    found = points("betas=(0.9,0.99),(0.8,0.9)", "seed=0,1")
    assert found == [{"betas": b, "seed": s} for b in ("(0.9,0.99)", "(0.8,0.9)") for s in ("0", "1")]


@pytest.mark.parametrize("texts", [("seed=0,0",), ("seed=",), ("seed=0", "seed=1")])
def test_axes_with_repeated_or_no_values_are_refused(texts):
    with pytest.raises(UserError):
        points(*texts)


def test_a_comparison_gets_three_seeds_and_folders_by_arm(config):
    plan = sweeps.plan(config, points("student.loss=kd,dkd"))
    assert plan.comparison and plan.seeds == [0, 1, 2] and plan.arms == ["loss=kd", "loss=dkd"]
    assert [run.folder for run in plan.runs] == [f"loss={a}/seed={s}" for a in ("kd", "dkd") for s in range(3)]
    assert sweeps.overrides(plan.runs[4].overrides) == ["--config.student.loss=dkd", "--config.seed=1"]


def test_a_search_keeps_the_seed_and_is_no_comparison(config):
    plan = sweeps.plan(config, points("batch_size=8,16", "optimizer.lr=0.1,1"))
    assert not plan.comparison and plan.seeds == [0]
    assert plan.runs[1].folder == "batch_size=8,lr=1.0"
    assert "search: 4 arms" in sweep.describe(plan, plan.runs)


def test_seeds_alone_are_one_arm(config):
    plan = sweeps.plan(config, points("seed=0,1,2"))
    assert plan.arms == [""] and [run.folder for run in plan.runs] == ["seed=0", "seed=1", "seed=2"]


@pytest.mark.parametrize(
    ("texts", "key"),
    [
        (("student.loss=kd,dkd", "batch_size=8,16"), "batch_size"),
        (("student.loss=kd,dkd", "optimizer.lr=0.1,0.2"), "optimizer.lr"),
        (("student.loss=kd,dkd", "student.model=a,b"), "student.model"),
    ],
)
def test_unfair_arms_are_refused_naming_the_key_and_the_fix(config, texts, key):
    with pytest.raises(UserError) as error:
        sweeps.plan(config, points(*texts))
    text = str(error.value)
    assert f"also differ in {key} (" in text and f"--config.{key}=<value>" in text and "method_keys" in text


def test_what_varies_along_with_the_method_in_a_list_is_seen(config, tmp_path):
    file = tmp_path / "list.json"
    file.write_text(json.dumps([{"student.loss": "kd", "batch_size": 8}, {"student.loss": "dkd", "batch_size": 16}]))
    with pytest.raises(UserError, match="also differ in batch_size"):
        sweeps.plan(config, sweep.points([], str(file)))


def test_what_does_not_touch_the_result_may_vary_and_the_config_names_its_method(config):
    assert sweeps.plan(config, points("student.loss=kd,dkd", "student.loss_weight=1,2")).comparison
    assert sweeps.plan(config, points("student.loss=kd,dkd", "log.every=1,2")).comparison
    assert sweeps.plan(f"{config}:own", points("optimizer.lr=1,2")).comparison
    with pytest.raises(UserError, match="student.loss"):
        sweeps.plan(f"{config}:own", points("optimizer.lr=1,2", "student.loss=kd,dkd"))


def test_arms_with_other_seeds_are_refused(config):
    listed = [{"student.loss": loss, "seed": seed} for loss, seed in (("kd", "0"), ("kd", "1"), ("dkd", "0"))]
    with pytest.raises(UserError, match="loss=dkd has the seeds 0 but loss=kd has 0, 1"):
        sweeps.plan(config, listed)


def test_a_list_may_name_its_arms_and_takes_seeds_from_the_grid(config, tmp_path):
    file = tmp_path / "list.json"
    listed = [{"arm": "weak", "student.loss_weight": 0.5}, {"arm": "strong", "student.loss_weight": 2}]
    file.write_text(json.dumps(listed))
    plan = sweeps.plan(config, sweep.points(["--sweep.seed=4,5"], str(file)))
    assert plan.arms == ["weak", "strong"] and plan.runs[3].folder == "strong/seed=5"
    assert sweeps.overrides(plan.runs[3].overrides) == ["--config.student.loss_weight=2", "--config.seed=5"]


def test_wrong_keys_and_lists_are_refused_before_anything_runs(config, tmp_path):
    with pytest.raises(UserError, match="--config.student.los: no such key; did you mean --config.student.loss"):
        sweeps.plan(config, points("student.los=kd,dkd"))
    with pytest.raises(UserError, match="nothing to sweep"):
        sweeps.plan(config, points())
    file = tmp_path / "list.json"
    for text in ("{", "{}", "[]", "[1]"):
        file.write_text(text)
        with pytest.raises(UserError, match="list.json"):
            sweeps.read_list(file)


def test_a_sweep_runs_resumes_and_grows(config, trainer, tmp_path, capfd):
    command = ["--config", config, "--workdir", str(tmp_path / "s"), "--config.batch_size=4"]
    assert sweep.main([*command, "--sweep.student.loss=kd,dkd", "--sweep.seed=0"], trainer=trainer) == 0
    out = capfd.readouterr().out
    assert "loss=kd/seed=0  | trained kd 0" in out and "fewer than three seeds" in out
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert record["arms"] == ["loss=kd", "loss=dkd"] and record["seeds"] == [0] and record["comparison"] is True
    assert json.loads((tmp_path / "s/loss=kd/seed=0/config.json").read_text())["batch_size"] == 4

    assert sweep.main([*command, "--sweep.student.loss=kd,dkd,dist", "--sweep.seed=0"], trainer=trainer) == 0
    out = capfd.readouterr().out
    assert "3 runs, 2 finished" in out and "trained dist 0" in out and "trained kd" not in out
    assert len(sweeps.load(tmp_path / "s").runs) == 3

    (tmp_path / "s/loss=dkd/seed=0/metrics.jsonl").write_text('{"step": 1, "kind": "train", "time": 0}\n')
    assert sweep.main([*command, "--sweep.student.loss=dkd", "--sweep.seed=0", "--dry-run"], trainer=trainer) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "loss=dkd/seed=0"


def test_a_failing_arm_is_reported_and_the_others_run(config, trainer, tmp_path, capfd):
    command = ["--config", config, "--workdir", str(tmp_path), "--sweep.student.loss=broken,kd", "--sweep.seed=0,1,2"]
    assert sweep.main([*command, "--parallel", "2"], trainer=trainer) == 1
    got = capfd.readouterr()
    assert "trainer: student.loss: broken" in got.out and "trained kd 2" in got.out
    assert got.err.count("failed; see") == 3
    assert "student.loss: broken" in (tmp_path / "loss=broken/seed=1/log.txt").read_text()
    assert len(sweeps.pending(tmp_path, sweeps.load(tmp_path))) == 3


def test_another_sweep_or_config_in_the_folder_is_refused(config, trainer, tmp_path, capfd):
    command = ["--config", config, "--workdir", str(tmp_path / "s")]
    assert sweep.main([*command, "--sweep.seed=0"], trainer=trainer) == 0
    record = (tmp_path / "s/sweep.json").read_bytes()
    for other in (["--sweep.batch_size=1,2"], ["--sweep.seed=0", "--config.batch_size=2"]):
        assert sweep.main([*command, *other], trainer=trainer) == 1
        assert "the folder holds another sweep" in capfd.readouterr().err
    path = pathlib.Path(config)
    path.write_text(path.read_text().replace("lr=0.1", "lr=0.2"))
    assert sweep.main([*command, "--sweep.seed=0,1"], trainer=trainer) == 1
    err = capfd.readouterr().err
    assert "optimizer.lr: 0.1 -> 0.2" in err and "another --workdir" in err
    assert (tmp_path / "s/sweep.json").read_bytes() == record


def test_a_stopped_sweep_stops_its_runs_and_asks_for_a_restart(config, trainer, tmp_path):
    code = f"import sys; from launch import sweep; sys.exit(sweep.main(sys.argv[1:], trainer={trainer!r}))"
    command = ["--config", config, "--workdir", str(tmp_path / "s"), "--sweep.student.loss=slow", "--sweep.seed=0,1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, *command], **pipes)
    try:
        while "waiting" not in process.stdout.readline():
            assert process.poll() is None
        started = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 42 and time.monotonic() - started < 20
    assert "resume with python -m launch.sweep" in err
    assert not (tmp_path / "s/loss=slow/seed=1").exists()
