"""launch.submit: what is printed is what would run; what is wrong is found first; records answer later."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from launch import submit, sweep
from research.core import sweeps
from research.pods import precheck
from tests.pods import make

SLURM = ("--engine", "slurm", "--topology", "cpu:2x2")
CONFIG = ("--config", "configs/small.py")
NASTY = ("--config.note=two words", """--config.data.path=it's "here" $HOME""")
CLOUD = ("--project=p", "--zone=us-west4-a", "--workdir=gs://bucket/runs/kd")
GOLDEN = {
    "slurm_gpus": (
        *("--engine=slurm", "--topology=h200:8x4", "--workdir=/shared/my runs/kd", "--name=kd", "--time=24:00:00"),
        *("--partition=gpu", "--account=lab", "--sbatch=--exclusive", "--sbatch=--mem=0", *NASTY),
    ),
    "slurm_sweep": (
        *(*SLURM, "--workdir=/shared/runs/kd", "--coordinator=10.0.0.7", "--grace=60", "--restarts=3"),
        *("--sweep.student.loss=kd,dkd", "--sweep.seed=0,1", "--parallel=2", NASTY[0]),
    ),
    "gke_tpus": ("--engine=gke", "--topology=v5e:4x4*2", "--cluster=c", "--image=image:1", *CLOUD, *NASTY),
    "gke_gpus": ("--engine=gke", "--topology=h200:8x2", "--cluster=c", "--image=image:1", "--spot", *CLOUD),
    "tpu_vm": ("--engine=tpu-vm", "--topology=v5litepod-16", "--spot", *CLOUD, *NASTY),
    "tpu_vm_sweep": ("--engine=tpu-vm", "--topology=v6e:4x4*2", *CLOUD, "--reserved", "--sweep.seed=0,1"),
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small repository, in which the user stands."""
    made = make.repository(tmp_path / "code")
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "executable", "python")
    return made


def run(capsys, *argv) -> tuple[int, str, str]:
    status = submit.main([str(a) for a in argv])
    got = capsys.readouterr()
    return status, got.out, got.err


@pytest.mark.parametrize("name", GOLDEN)
def test_a_dry_run_prints_what_the_golden_file_says(root, capsys, golden, name):
    status, out, err = run(capsys, *CONFIG, *GOLDEN[name], "--dry-run")
    assert status == 0, err
    file = golden / "submit" / f"{name}.txt"
    text = out.replace(str(root), "/repository")
    if os.environ.get("STILLROOM_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
    assert not (root / "runs").exists()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_scripts_of_the_golden_files_are_bash(golden, name):
    text = (golden / "submit" / f"{name}.txt").read_text()
    scripts = [part for part in re.findall(r"^(?:\|.*\n)+", text, re.M) if part.startswith("| #!/bin/bash")]
    assert len(scripts) == (2 if name == "tpu_vm_sweep" else 1)
    for script in scripts:
        lines = re.sub(r"^\| ?", "", script, flags=re.M)
        done = subprocess.run(["bash", "-n"], input=lines, text=True, capture_output=True)
        assert done.returncode == 0 and not done.stderr


def commands(text: str, program: str) -> list[list[str]]:
    """The commands of a program in the text of a dry run."""
    return [shlex.split(line[2:]) for line in text.splitlines() if line.startswith(f"$ {program} ")]


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_parses_every_command(golden, tmp_path):
    """Its parser speaks before it looks for an account, and there is neither one nor a way out of this machine."""
    offline = {"TYPE": "http", "ADDRESS": "127.0.0.1", "PORT": "9"}
    env = {**os.environ, **{f"CLOUDSDK_PROXY_{key}": value for key, value in offline.items()}}
    env |= {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1", "HOME": str(tmp_path)}
    env |= {"CLOUDSDK_CORE_CHECK_GCE_METADATA": "false", "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1"}
    (tmp_path / "script.sh").write_text("")

    def refused(command):
        words = [re.sub("(startup-script=).*", rf"\1{tmp_path}/script.sh", word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=120, stdin=subprocess.DEVNULL)
        assert done.returncode != 0, words  # nobody is logged in
        return re.search(r"unrecognized arguments|argument .*:|Invalid choice", done.stderr)

    text = "".join((golden / "submit" / f"{name}.txt").read_text() for name in (*GOLDEN, "questions"))
    unlike = {}  # one of each verb with the same flags: a second of gcloud each
    for command in commands(text, "gcloud"):
        verb = [word for word in command if re.fullmatch("[a-z]+(-[a-z]+)*", word) and word != "kd"]
        unlike[*verb, *(word.partition("=")[0] for word in command if word.startswith("-"))] = command
    assert len(unlike) >= 8
    for command in unlike.values():
        assert not refused(command), command
    assert refused([*next(iter(unlike.values())), "--no-such-flag"])
    inside = "gcloud compute tpus queued-resources delete kd --project=p --zone=z --force --quiet --async"
    assert inside.replace(" kd --project=p --zone=z", ' "$name" "--project=$project" "--zone=$zone"') in text
    assert not refused(inside.split())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--engine=slrum", "--topology=cpu:1"), "--engine slrum: not one; did you mean slurm?"),
        (("--engine=slurm", "--topology=h20:8"), "did you mean h200?"),
        ((*SLURM, "--partiton=x"), "--partiton=x: no such option; did you mean --partition?"),
        ((*SLURM, "--image=x"), "--image: not for slurm, only for gke"),
        (("--engine=tpu-vm", "--topology=v5e:4x4", "--time=5"), "--time: not for tpu-vm, only for slurm"),
        ((*SLURM, "--config.note.x=1"), "--config.note.x"),
        ((*SLURM, "--sweep.sed=1,2"), "did you mean --config.seed?"),
        ((*SLURM, "--parallel=2"), "there is one run"),
        ((*SLURM, "--commit=nowhere"), "no such commit"),
        ((*SLURM, "--name=K D"), "try k-d"),
        ((*SLURM, "--restarts=-1"), "--restarts -1"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_name(root, capsys, argv, says):
    status, out, err = run(capsys, *CONFIG, "--workdir=/shared/w", "--dry-run", *argv)
    assert status == 1 and says in err and not out


def test_uncommitted_changes_are_refused_unless_told(root, capsys, tmp_path):
    (root / "new.py").write_text("")
    argv = (*SLURM, *CONFIG, f"--workdir={tmp_path}/w", "--dry-run")
    assert "new.py; commit them" in run(capsys, *argv)[2]
    assert run(capsys, *argv, "--dirty-ok")[0] == 0


def test_the_folder_of_another_run_is_refused(root, capsys, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/config.json").write_text(json.dumps({"seed": 1, "note": "", "student": {"loss": "kd"}}))
    status, _, err = run(capsys, *SLURM, *CONFIG, f"--workdir={tmp_path}/w", "--dry-run")
    assert status == 1 and "another config" in err and "seed: 1 -> 0" in err


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands, on the PATH."""
    make.program(tmp_path / "bin", "sbatch", 'cp "$2" "$(dirname "$2")/submitted"; echo 77')
    make.program(tmp_path / "bin", "squeue", 'echo "77 RUNNING $*"')
    make.program(tmp_path / "bin", "sacct", "exit 1")
    make.program(tmp_path / "bin", "scancel", f'echo "$*" > {tmp_path}/cancelled')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_a_job_is_submitted_remembered_and_asked_about(root, capsys, tmp_path, cluster):
    argv = (*SLURM, *CONFIG, f"--workdir={tmp_path}/runs/kd", "--no-check")
    status, out, err = run(capsys, *argv)
    assert status == 0 and "kd: submitted as 77" in out, err
    assert (tmp_path / "runs/kd/jobs/submitted").read_text().startswith("#!/bin/bash")
    commit = make.git(root, "rev-parse", "HEAD")
    assert (tmp_path / "runs/kd/code" / commit / "launch/train.py").is_file()
    record = json.loads((root / "runs/.jobs/kd.json").read_text())
    assert record["identifiers"] == ["77"] and record["commit"] == commit and record["options"]["grace"] == 300

    assert run(capsys, *argv, "--config.seed=5")[0] == 0  # the same folder: the job is submitted again
    assert "is the job of" in run(capsys, *argv, "--name=kd", f"--workdir={tmp_path}/runs/other")[2]
    status, out, _ = run(capsys, "status", "kd")
    assert status == 0 and "RUNNING" in out and f"{tmp_path}/runs/kd: not started" in out
    status, out, _ = run(capsys, "list")
    assert status == 0 and out.startswith("kd  slurm cpu:2x2")
    assert run(capsys, "cancel", "kd")[0] == 0 and (tmp_path / "cancelled").read_text() == "77\n"
    assert "did you mean kd?" in run(capsys, "cancel", "kdd")[2]
    assert "--run 1: kd has 1 runs" in run(capsys, "logs", "kd", "--run=1")[2]


def test_logs_are_the_end_of_the_files(root, capfd, tmp_path, cluster):
    submit.main([*SLURM, *CONFIG, f"--workdir={tmp_path}/kd", "--no-check"])
    for name in ("kd-77.out", "kd-77-0.out"):
        (tmp_path / "kd/logs" / name).write_text(f"first\nlast of {name}\n")
    assert submit.main(["logs", "kd", "--lines=1"]) == 0
    out = capfd.readouterr().out
    assert "last of kd-77.out" in out and "last of kd-77-0.out" in out and "first" not in out


def test_an_engine_that_forgot_or_is_not_there_says_so(root, capsys, tmp_path, cluster):
    run(capsys, *SLURM, *CONFIG, f"--workdir={tmp_path}/kd", "--no-check")
    make.program(tmp_path / "bin", "squeue", "exit 1")
    status, _, err = run(capsys, "status", "kd")
    assert status == 1 and "no answer from: squeue" in err and "no answer from: sacct" in err


def test_a_sweep_is_one_array_and_the_same_plan_as_launch_sweep(root, capsys, tmp_path, cluster):
    argv = (*CONFIG, f"--workdir={tmp_path}/s", "--sweep.seed=0,1,2")
    assert run(capsys, *SLURM, *argv, "--parallel=2", "--no-check")[0] == 0
    script = (tmp_path / "s/jobs/s.sh").read_text()
    assert "--array=0-2%2" in script
    assert [one.folder for one in sweeps.load(tmp_path / "s").runs] == ["seed=0", "seed=1", "seed=2"]
    (tmp_path / "s/seed=1").mkdir()
    (tmp_path / "s/seed=1/metrics.jsonl").write_text('{"step": 1, "time": 0, "kind": "done"}\n')
    assert sweep.main([*argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["seed=0", "seed=2"]
    assert run(capsys, *SLURM, *argv, "--no-check")[0] == 0  # again: what is left
    script = (tmp_path / "s/jobs/s.sh").read_text()
    assert "--array=0-1%2" in script and "seed=2" in script and "seed=1" not in script


def test_the_first_of_several_submissions_is_not_lost_when_the_second_fails(root, capsys, tmp_path, monkeypatch):
    make.program(
        tmp_path / "bin", "gcloud", '[[ "$*" == *"create kd-1"* ]] && { echo "no quota" >&2; exit 1; }; exit 0'
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    argv = ("--engine=tpu-vm", "--topology=v5e:4x4", *CLOUD, "--sweep.seed=0,1")
    monkeypatch.setattr(sweeps, "load", lambda folder: None)  # neither bucket nor client here
    monkeypatch.setattr(sweeps, "pending", lambda folder, plan: plan.runs)
    status, _, err = run(capsys, *CONFIG, *argv, "--no-check")
    assert status == 1 and "no quota" in err
    assert "already submitted: gcloud compute tpus queued-resources create kd-0" in err


CHECK = """
    import json, os, sys
    assert os.path.exists("configs/small.py"), os.getcwd()
    print("compiling")
    status = {verdict}
    print(json.dumps(dict(fits=status == 0, topology="cpu:2x2", peak_bytes=3e9, hbm_bytes=2e9,
                          suggestions=["--config.parallel.axes.fsdp=2"]), indent=2))
    print("compile: student.model: no such model", file=sys.stderr)
    sys.exit(status)
"""


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        (0, "fits: 3 of 2 GB a chip"),
        (3, "OUT OF MEMORY on cpu:2x2: 3 of 2 GB a chip; nothing was submitted\n  --config.parallel.axes.fsdp=2"),
        (1, "does not compile, nothing was submitted: compile: student.model: no such model"),
    ],
)
def test_the_commit_is_compiled_before_it_is_submitted(root, capsys, tmp_path, cluster, monkeypatch, verdict, says):
    monkeypatch.undo()  # the real Python
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (root / "launch/compile.py").write_text(CHECK.replace("\n    ", "\n").format(verdict=verdict))
    make.git(root, "add", ".")
    make.git(root, "commit", "--quiet", "--message=check")
    status, out, err = run(capsys, *SLURM, *CONFIG, f"--workdir={tmp_path}/kd")
    assert status == (verdict != 0) and says in out + err
    assert (root / "runs/.jobs/kd.json").exists() == (verdict == 0)
    assert (tmp_path / "kd/jobs/submitted").exists() == (verdict == 0)


def test_a_sweep_compiles_every_arm_once(root):
    given, extra = submit.configs.parse_args(
        submit.parser(),
        [*SLURM, *CONFIG, "--workdir=/shared/s", "--sweep.student.loss=kd,dkd", "--sweep.seed=0,1,2"],
        prefixes=("--config.", "--sweep."),
    )
    found = precheck.commands(*submit.build(given, extra, pathlib.Path(root)))
    assert [[a for a in one.arguments if a.startswith("--config.")] for one in found] == [
        ["--config.student.loss=kd", "--config.seed=0"],
        ["--config.student.loss=dkd", "--config.seed=0"],
    ]


def test_the_questions_of_every_engine_are_those_of_the_golden_file(root, capsys, golden):
    text = ""
    for name, argv in GOLDEN.items():
        given, extra = submit.configs.parse_args(
            submit.parser(), [*CONFIG, *argv, "--dry-run"], prefixes=("--config.", "--sweep.")
        )
        engine, options = submit.engine_options(given.engine, given)
        found, _ = submit.build(given, extra, pathlib.Path(root))
        record = submit.remember(found, given.engine, engine.identifiers(found, "77"), options, [])
        submit.records.save("runs/.jobs", record)
        capsys.readouterr()
        for question in ("status", "logs", "cancel"):
            assert submit.main([question, found.name, "--dry-run"]) == 0
        text += f"# {name}\n{capsys.readouterr().out}\n"
    file = golden / "submit" / "questions.txt"
    if os.environ.get("STILLROOM_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
