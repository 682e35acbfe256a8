"""TPU VMs: the start-up script run with stand-ins for the cloud, and what is asked of gcloud."""

import json
import os
import subprocess

import pytest

from research.core.errors import UserError
from research.pods import job, records, ship, tpu_vm
from tests.pods import make

OPTIONS = tpu_vm.Options(project="p", zone="us-west4-a")

# The work folder is a local one; every call is written down.
GCLOUD = """
    echo "gcloud $*" >> "$CALLS"
    [[ "$1 $2" == "storage cp" ]] && { [[ "$3" == --* ]] && shift; cat "${3/#-/\\/dev/stdin}" > "$4"; exit; }
    [[ "$1 $2" == "storage cat" ]] && cat "$3"
    exit 0
"""
CURL = """
    case "$*" in
      *agent-worker-number*) echo "${WORKER:-0}" ;;
      *tpu-env*)
        printf "ACCELERATOR_TYPE: 'v5litepod-16'\\nMEGASCALE_SLICE_ID: '1'\\n" | head -n "${LINES_OF_ENV:-1}" ;;
      *preempted*) exit 22 ;;
    esac
"""
# `python3 -m uv venv`: an environment whose Python says how it was called and ends as it is told, start by start.
PYTHON = """
    echo "python3 $*" >> "$CALLS"
    [[ "$*" == *"uv venv"* ]] || exit 0
    mkdir -p .venv/bin
    cat > .venv/bin/python <<'END'
    #!/bin/bash
    echo "train $#" >> "$CALLS"; printf "%s\\n" "$@" > "$CALLS.argv"
    number=$(grep -c "^train" "$CALLS")
    exit "$(echo $STATUSES | cut -d ' ' -f "$number")"
    END
    sed -i 's/^ *//' .venv/bin/python
    chmod +x .venv/bin/python
"""


@pytest.fixture
def machine(tmp_path):
    """Runs the start-up script of a job; returns its log, the calls and the training's arguments."""
    root, programs = make.repository(tmp_path / "code"), tmp_path / "bin"
    for name, text in (("gcloud", GCLOUD), ("curl", CURL), ("python3", PYTHON), ("sleep", "exit 0")):
        make.program(programs, name, text)
    found = make.job("v5e:4x4", str(tmp_path / "w"), restarts=2, commit=ship.commit(root))
    for name in ("jobs", "logs"):
        (tmp_path / "w" / name).mkdir(parents=True)
    job.carry_out([*ship.upload(root, found), *ship.place(found, "jobs/small.state", "submitted\n")])
    text = tpu_vm.script(found, OPTIONS, "small", found.runs[0])
    text = text.replace("/opt/stillroom", str(tmp_path / "opt")).replace("/var/log", str(tmp_path))
    text = text.replace("export HOME=/root", f"export HOME={tmp_path}")

    def run(statuses, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "CALLS": str(calls), "STATUSES": statuses, **environment}
        subprocess.run(["bash"], input=text, env=env, capture_output=True, text=True, timeout=60)
        state = (tmp_path / "w/jobs/small.state").read_text().strip()
        return state, (tmp_path / "stillroom.log").read_text(), calls.read_text()

    return run


def test_it_installs_trains_again_when_asked_and_gives_the_machines_back(machine, tmp_path):
    state, log, calls = machine("42 137 0")
    assert state == "done" and calls.count("train ") == 3 and log.count("starting again") == 2
    argv = (tmp_path / "calls.argv").read_text().splitlines()
    expected = ["--config", "configs/small.py", "--workdir", str(tmp_path / "w"), *make.NASTY]
    assert argv == ["-m", "launch.train", "--distributed", *expected]
    assert "uv pip install --quiet --python .venv/bin/python -e .[tpu,gcs]" in calls
    assert "queued-resources delete small --project=p --zone=us-west4-a --force --quiet" in calls
    assert "starting again" in (tmp_path / "w/logs/small-0-0.log").read_text()


@pytest.mark.parametrize(
    ("statuses", "starts", "state"),
    [
        ("1", 1, "failed: slice 0, worker 0, status 1"),
        ("42 1", 2, "failed: slice 0, worker 0, status 1"),
        ("42 42 42 42", 3, "failed: given up after 2 restarts"),
    ],
)
def test_what_becomes_of_an_exit_status(machine, statuses, starts, state):
    found, _, calls = machine(statuses)
    assert found == state and calls.count("train ") == starts
    assert calls.count("queued-resources delete") == 1


def test_only_the_first_worker_of_the_first_slice_gives_the_machines_back(machine):
    assert "queued-resources delete" not in machine("0", WORKER="3")[2]
    state, log, calls = machine("0", LINES_OF_ENV="2")
    assert "slice 1, worker 0: start" in log and "queued-resources delete" not in calls


def test_the_failure_of_another_worker_ends_the_job(machine, tmp_path):
    (tmp_path / "w/jobs/small.state").write_text("failed: slice 0, worker 2, status 1\n")
    state, _, calls = machine("42 0")
    assert state == "failed: slice 0, worker 2, status 1"
    assert "train" not in calls and "queued-resources delete" in calls


def test_a_repaired_machine_does_not_install_twice(machine):
    machine("0")
    _, _, calls = machine("0")
    assert "uv" not in calls


@pytest.mark.parametrize(
    ("topology", "workdir", "options", "says"),
    [
        ("h200:8", "gs://b/w", {}, "not a TPU; use --engine slurm or gke"),
        ("v5e:4x4", "/disk", {}, "gs://bucket/folder"),
        ("v5p:4x4x16", "gs://b/w", {}, "v5p-512, which gives v5p:4x8x8"),
        ("v5e:4x4", "gs://b/w", {"runtime_version": "v2-alpha-tpuv5lite"}, "did you mean v2-alpha-tpuv5-lite?"),
        ("v6e:4x4", "gs://b/w", {"runtime_version": "ubuntu"}, "the usual one is v2-alpha-tpuv6e"),
        ("v5e:4x4", "gs://b/w", {"zone": "us-west4a"}, "did you mean us-west4-a?"),
        ("v5e:4x4", "gs://b/w", {"project": ""}, "--project"),
        ("v5e:4x4", "gs://b/w", {"spot": True, "reserved": True}, "--spot"),
    ],
)
def test_what_is_not_offered_is_refused_with_the_nearest(topology, workdir, options, says):
    with pytest.raises(UserError) as error:
        tpu_vm.check(make.job(topology, workdir), OPTIONS._replace(**options))
    assert says in str(error.value)


def test_slices_are_the_nodes_of_one_resource():
    command = tpu_vm.create(make.job("v5e:4x4*2", "gs://b/w"), OPTIONS, "small").arguments
    assert "--node-count=2" in command and "--node-prefix=small" in command and "--node-id=small" not in command
    record = records.Record("small", "tpu-vm", ["small"], "v5e:4x4*2", "c", "gs://b/w", ["gs://b/w"], 0, "", "", {}, [])
    record = record._replace(options=json.loads(json.dumps(OPTIONS._asdict())))
    ssh, stored = tpu_vm.logs(record, "small", run=0, task=5, lines=9, follow=False)
    assert ssh.arguments[5:7] == ("small-1", "--worker=1")
    assert stored.arguments[-1] == "gs://b/w/logs/small-1-1.log"
