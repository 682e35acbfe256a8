"""The batch script: its options, what it makes of exit statuses, and that it survives any override."""

import json
import os
import subprocess
import sys

import pytest

from research.core.errors import UserError
from research.pods import ship, slurm
from research.pods.records import Record
from tests.pods import make

# Starts what follows its own options once a process of $STATUSES, numbered and with that exit status; the highest is
# what the real one would end with.
SRUN = """
    echo "srun $*" >> "$CALLS"
    while [[ $1 == --* ]]; do shift; done
    worst=0; number=0
    for status in $STATUSES; do
      SLURM_PROCID=$number STATUS=$status "$@" || { s=$?; [ $s -gt $worst ] && worst=$s; }
      number=$((number + 1))
    done
    exit $worst
"""
CALL = """
    echo "$(basename "$0") $*" >> "$CALLS"
"""


@pytest.fixture
def cluster(tmp_path):
    """Runs a batch script with stand-ins for SLURM's commands; returns its status, output and calls."""
    programs = tmp_path / "bin"
    make.program(programs, "srun", SRUN)
    make.program(programs, "scontrol", CALL + '[ "$1" = show ] && printf "node7\\nnode8\\n"')
    make.program(programs, "squeue", 'echo "${STATE:-RUNNING}"')

    def run(text, statuses="0", **environment):
        (tmp_path / "calls").unlink(missing_ok=True)
        names = {"SLURM_JOB_ID": "5000", "SLURM_JOB_NODELIST": "node[7-8]", "CALLS": str(tmp_path / "calls")}
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "STATUSES": statuses, **names, **environment}
        env.pop("XLA_FLAGS")
        done = subprocess.run(["bash"], input=text, capture_output=True, text=True, env=env, timeout=60)
        return done.returncode, done.stdout, (tmp_path / "calls").read_text()

    return run


def script(tmp_path, topology="cpu:2x2", options=None, **kwargs):
    """The script of a job whose code is in place."""
    found = make.job(topology, str(tmp_path / "work folder"), **kwargs)
    make.repository(tmp_path / "code")
    os.makedirs(os.path.dirname(ship.folder(found)))
    os.symlink(tmp_path / "code", ship.folder(found))
    return slurm.script(found, options or slurm.Options(python=sys.executable, time="1:00:00"))


def test_any_override_arrives_as_it_was_given(tmp_path, cluster):
    status, out, calls = cluster(script(tmp_path), "0 0")
    one, two = map(json.loads, out.splitlines())
    assert status == 0 and one["argv"] == two["argv"]
    work = str(tmp_path / "work folder")
    assert one["argv"] == ["--distributed", "--config", "configs/small.py", "--workdir", work, *make.NASTY]
    assert os.path.realpath(one["cwd"]) == os.path.realpath(tmp_path / "code")
    assert one["JAX_COORDINATOR_ADDRESS"] == f"node7:{5000 % 4096 + 61440}"
    assert one["JAX_PLATFORMS"] == "cpu" and "device_count=2" in one["XLA_FLAGS"]
    assert "requeue" not in calls


@pytest.mark.parametrize(
    ("statuses", "environment", "status", "requeued", "says"),
    [
        ("42 42", {}, 42, True, "back into the queue"),
        ("0 137", {}, 42, True, "back into the queue"),  # killed: out of memory, or its host lost
        ("7 42", {}, 7, False, "process 0 ended with status 7"),  # the other was interrupted because of it
        ("137 1", {}, 1, False, "process 1 ended with status 1"),
        ("42 42", {"SLURM_RESTART_COUNT": "19"}, 42, True, "back"),
        ("42 42", {"SLURM_RESTART_COUNT": "20"}, 42, False, "giving up"),
        ("42 42", {"STATE": "COMPLETING"}, 42, False, ""),  # cancelled: it must not come back
    ],
)
def test_what_becomes_of_an_exit_status(tmp_path, cluster, statuses, environment, status, requeued, says):
    found, out, calls = cluster(script(tmp_path), statuses, **environment)
    assert found == status and says in out
    assert ("scontrol requeue 5000" in calls) == requeued


def test_an_earlier_start_does_not_count(tmp_path, cluster):
    text = script(tmp_path)
    assert cluster(text, "7")[0] == 7
    assert cluster(text, "0")[0] == 0


def test_an_array_takes_the_run_of_its_number(tmp_path, cluster):
    text = script(tmp_path, runs=3, parallel=2)
    assert "#SBATCH --array=0-2%2" in text.splitlines()
    _, out, _ = cluster(text, "0", SLURM_ARRAY_TASK_ID="2")
    assert json.loads(out)["argv"][3:5] == ["--workdir", str(tmp_path / "work folder/seed=2")]


def test_gpus_get_a_process_each_and_hosts_of_cpus_one(tmp_path):
    options = slurm.Options(partition="big", sbatch=("--exclusive",), coordinator="10.0.0.1")
    lines = slurm.script(make.job("h200:8x4", str(tmp_path)), options).splitlines()
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=big", "--exclusive"):
        assert f"#SBATCH {line}" in lines
    assert "coordinator=10.0.0.1" in lines and not any("JAX_PLATFORMS" in line for line in lines)
    lines = slurm.script(make.job("cpu:8x4", str(tmp_path)), options).splitlines()
    assert "#SBATCH --ntasks-per-node=1" in lines and not any("gpus-per-node" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("24:00:00", 86400), ("1-12", 129600), ("1-0:30", 88200), ("2-01:00:01", 176401)],
)
def test_time_limits_are_read_as_slurm_reads_them(text, seconds):
    assert slurm.seconds(text) == seconds


@pytest.mark.parametrize(
    ("topology", "workdir", "options", "says"),
    [
        ("v5e:4x4", "/w", {}, "--engine gke or tpu-vm"),
        ("cpu:1x2", "gs://b/w", {}, "share a folder"),
        ("cpu:1x2", "/w", {"time": "5"}, "not longer than --grace 300"),
        ("cpu:1x2", "/w", {"time": "1h"}, "--time '1h'"),
        ("cpu:1x2", "/w", {"coordinator": "h:x"}, "give the host alone"),
        ("cpu:1x2", '/w"', {}, "quotes"),
        ("cpu:1x2", "/w", {"sbatch": ("exclusive",)}, "--sbatch=--exclusive"),
    ],
)
def test_what_slurm_would_refuse_is_refused(topology, workdir, options, says):
    with pytest.raises(UserError) as error:
        slurm.check(make.job(topology, workdir), slurm.Options(**options))
    assert says in str(error.value)


def test_questions_name_the_job_and_the_logs_of_its_run():
    record = Record("kd", "slurm", ["12"], "cpu:1x2", "c.py", "/w", ["/w/a", "/w/b"], 2, "1" * 40, "", {}, [])
    assert slurm.logs(record, "12", run=1, task=3, lines=9, follow=True)[0].arguments == (
        *("tail", "-n", "9", "-F"),
        *("/w/logs/kd-12_1.out", "/w/logs/kd-12_1-3.out"),
    )
    assert slurm.logs(record._replace(parallel=0), "12", run=0, task=0, lines=9, follow=False)[0].arguments[3:] == (
        *("/w/logs/kd-12.out", "/w/logs/kd-12-0.out"),
    )
    assert slurm.cancel(record, "12").arguments == ("scancel", "12")
    assert slurm.identifiers(None, "12;cluster") == slurm.identifiers(None, "note\n12") == ["12"]
    with pytest.raises(UserError, match="no job number"):
        slurm.identifiers(None, "")
