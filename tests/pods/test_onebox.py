"""Jobs on a real SLURM: `python -m pytest -m slurm tests/pods` (some minutes; see onebox.py for what it needs)."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from research.core import runs
from research.port import tensors
from tests.pods import onebox
from tests.pods.onebox import wait

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(onebox.missing()), reason=f"needs {', '.join(onebox.missing())}"),
]
CONFIG = "tests/launch/tiny.py"
STEPS = 400
SHORT = (f"--config.steps={STEPS}", "--config.save.every=0.2")  # a checkpoint every 18 steps


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    with onebox.Onebox(tmp_path_factory.mktemp("slurm") / "onebox") as found:
        yield found


class Submitted:
    """A two-node job that `launch.submit` sent off."""

    def __init__(self, box, workdir: pathlib.Path, name: str, *options: str):
        self.box, self.workdir, self.name = box, workdir, name
        self.job = re.findall(r"\b(\d+)\b", self.say("--engine", "slurm", "--topology", "cpu:1x2", *options))[-1]

    def say(self, *words: str) -> str:
        """What `launch.submit` prints."""
        if words[0].startswith("--"):
            words += ("--name", self.name, "--workdir", str(self.workdir), "--config", CONFIG, "--dirty-ok")
            words += ("--coordinator", "127.0.0.1", "--no-check")
        env = self.box.env | {"PYTHONPATH": "", "XLA_FLAGS": ""}
        command = [sys.executable, "-m", "launch.submit", *words, "--jobs", str(self.box.root / "jobs")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def reached(self, step: int) -> None:
        """Waits until the run has logged a step."""
        wait(lambda: self.logged() >= step, 180, f"step {step}")

    def logged(self) -> int:
        return runs.read(self.workdir).step if (self.workdir / runs.METRICS).exists() else 0

    def log(self) -> str:
        return "\n".join(file.read_text() for file in sorted((self.workdir / "logs").glob("*.out")))

    def done(self) -> dict:
        """Waits for the end; the trained weights."""
        wait(lambda: self.box.state(self.job) in ("COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED"), 300, "the end")
        assert self.box.state(self.job) == "COMPLETED", self.log()
        assert runs.finished(self.workdir)
        return tensors.read(self.workdir / "weights" / "small.safetensors")


@pytest.fixture(scope="module")
def straight(box, tmp_path_factory):
    """The weights and metrics of a two-node job that nothing happened to."""
    job = Submitted(box, tmp_path_factory.mktemp("straight"), "straight", *SHORT)
    return job.done(), losses(job.workdir)


def losses(workdir) -> list:
    return runs.read(workdir).series["train", "", "loss"]


def assert_identical(job: Submitted, straight) -> None:
    weights = job.done()
    assert weights.keys() == straight[0].keys()
    assert all((weights[name] == straight[0][name]).all() for name in weights)
    assert losses(job.workdir) == straight[1]


def test_two_nodes_train_as_one_job(straight, box):
    assert len(straight[1]) == STEPS


def test_requeue_saves_and_resumes_exactly(box, straight, tmp_path):
    job = Submitted(box, tmp_path, "requeued", *SHORT)
    job.reached(60)
    box.run("scontrol", "requeue", job.job)
    box.release(job.job)
    assert_identical(job, straight)
    assert box.restarts(job.job) == 1
    saved = re.search(r"told to stop: step (\d+) is saved", job.log())
    assert saved and f"resumed at step {saved[1]}" in job.log()


def test_a_killed_node_leads_to_a_restart_that_resumes_exactly(box, straight, tmp_path):
    job = Submitted(box, tmp_path, "killed", *SHORT)
    job.reached(60)
    box.kill_node("n1")
    box.start_node("n1")
    box.release(job.job)
    assert_identical(job, straight)
    assert box.restarts(job.job) >= 1  # started so soon, SLURM's late orders to the old job may hit the new one
    assert re.search(r"resumed at step \d*[1-9]\d*", job.log())


def test_the_warning_before_the_time_limit_saves_and_requeues(box, tmp_path):
    endless = ("--config.steps=1000000", "--config.save.every=0")
    job = Submitted(box, tmp_path, "limited", *endless, "--time=2", "--grace=60")
    wait(lambda: "is saved, exiting with status 42" in job.log(), 180, "the warning")
    saved = int(re.search(r"step (\d+) is saved", job.log())[1])
    assert (tmp_path / "checkpoints" / str(saved)).is_dir()
    box.release(job.job)
    wait(lambda: f"resumed at step {saved}" in job.log(), 120, "the resumption")
    assert box.state(job.job) == "RUNNING" and "RUNNING" in job.say("status", job.name)
    assert f"resumed at step {saved}" in job.say("logs", job.name)
    job.say("cancel", job.name)
    wait(lambda: box.state(job.job) == "CANCELLED", 60, "the job to be cancelled")


def test_a_bug_is_not_started_again(box, tmp_path):
    job = Submitted(box, tmp_path, "broken", "--config.optimizer.lr=1e38", "--config.optimizer.name=sgd")
    wait(lambda: box.state(job.job) in ("FAILED", "COMPLETED"), 180, "the end")
    assert box.state(job.job) == "FAILED" and box.restarts(job.job) == 0
    assert "not started again" in job.log() and "at step" in job.log()


def test_a_sweep_is_an_array_with_a_limit(box, tmp_path):
    Submitted(box, tmp_path, "swept", "--sweep.seed=0,1,2", "--parallel=1", "--config.steps=4")
    wait(lambda: all(runs.finished(tmp_path / f"seed={seed}") for seed in range(3)), 300, "three runs")
    starts = [json.loads((tmp_path / f"seed={s}" / "metrics.jsonl").read_text().splitlines()[0]) for s in range(3)]
    ends = [json.loads((tmp_path / f"seed={s}" / "metrics.jsonl").read_text().splitlines()[-1]) for s in range(3)]
    order = sorted(range(3), key=lambda s: starts[s]["time"])
    assert all(ends[a]["time"] <= starts[b]["time"] for a, b in zip(order, order[1:], strict=False))  # one at a time
    report = [sys.executable, "-m", "launch.report", str(tmp_path)]
    shown = subprocess.run(report, env=os.environ, capture_output=True, text=True, check=True).stdout
    assert "3 seeds" in shown
