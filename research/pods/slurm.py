"""SLURM: a batch script that starts one process a node (or a GPU), saves when warned, and puts itself back in line.

The warning is SIGUSR1, `grace` seconds before the time limit; requeueing, preemption and `scancel` send SIGTERM. Both
reach the training processes, which save and end with status 42; the batch shell outlives them and asks SLURM to queue
the job again. Every process notes its status, for `srun` reports only the highest: a process killed because another
failed would hide the failure.
"""

import pathlib
import re
from typing import NamedTuple

from research.core.errors import RESTART, UserError
from research.pods import ship
from research.pods.job import FATAL, Command, Job, Step, arguments, bash, command, train
from research.pods.records import Record


class Options(NamedTuple):
    """What only SLURM needs; see `python -m launch.submit --help`."""

    partition: str = ""
    account: str = ""
    time: str = ""
    grace: int = 300
    python: str = "python"
    coordinator: str = ""
    sbatch: tuple[str, ...] = ()


# Statuses by process, for srun tells only the highest. The traps let the shell outlive the signal and note the status.
_TASK = """trap : TERM USR1; "$@"; s=$?; [ $s = 0 ] || echo $s > "$0/$SLURM_PROCID"; exit $s"""
_FIRST_HOST = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def check(job: Job, options: Options) -> None:
    """Refuses what SLURM would refuse, or would take and never run."""
    if job.topology.chip.platform == "tpu":
        raise UserError(f"--topology {job.topology.name}: TPUs are not behind SLURM; use --engine gke or tpu-vm")
    if job.remote:
        raise UserError(f"--workdir {job.workdir}: SLURM jobs share a folder with this machine; give its path")
    limit = seconds(options.time) if options.time else None
    if limit is not None and limit <= options.grace:
        raise UserError(f"--time {options.time}: not longer than --grace {options.grace}, the seconds to save in")
    port = options.coordinator.partition(":")[2]
    if port and (not port.isdecimal() or job.parallel > 1):
        raise UserError(f"--coordinator {options.coordinator}: give the host alone; each job then takes its own port")
    for text in (job.workdir, options.partition, options.account, *options.sbatch):
        if "\n" in text or '"' in text:
            raise UserError(f"{text!r}: quotes and line breaks cannot stand in a batch script's options")
    for text in options.sbatch:
        if not text.startswith("-"):
            raise UserError(f"--sbatch {text}: write the option with its dashes, --sbatch=--{text}")


def seconds(text: str) -> int:
    """A time limit as SLURM writes it: `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:…]`."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise UserError(f"--time {text!r}: write it as minutes, hours:minutes:seconds or days-hours:minutes")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:  # minutes first; otherwise hours first
        parts = [0, *parts]
    hours, minutes, secs = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def submit(job: Job, options: Options, root: pathlib.Path) -> list[Step]:
    """The steps that submit a job from the repository at `root`."""
    file = f"{job.workdir}/jobs/{job.name}.sh"
    return [
        command("mkdir", "-p", f"{job.workdir}/logs", f"{job.workdir}/jobs"),
        *ship.unpack(root, job),
        *ship.place(job, f"jobs/{job.name}.sh", script(job, options)),
        command("sbatch", "--parsable", file, submits=True),
    ]


def identifiers(job: Job, said: str) -> list[str]:
    """The job's number from what `sbatch --parsable` printed: `123` or `123;cluster`."""
    found = re.search(r"^(\d+)(?:;\S+)?$", said, re.MULTILINE)
    if not found:
        raise UserError(f"sbatch gave no job number: {said!r}")
    return [found[1]]


def script(job: Job, options: Options) -> str:
    """The batch script."""
    parts = (_directives(job, options), _prologue(job, options), _runs(job), _launch(job, options))
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _directives(job: Job, options: Options) -> list[str]:
    devices, nodes = job.topology.shape
    cuda = job.topology.chip.platform == "cuda"
    # As JAX reads SLURM: with GPUs a process for each, which sees all of its node and takes the one of its number.
    values = {
        "job-name": job.name,
        "nodes": nodes,
        "ntasks-per-node": devices if cuda else 1,
        "gpus-per-node": devices if cuda else None,
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "array": f"0-{len(job.runs) - 1}%{job.parallel}" if job.parallel else None,
        "requeue": True,
        "open-mode": "append",
        "signal": f"USR1@{options.grace}",
        "dependency": "singleton",
        "output": _log(job),
    }
    lines = [f"--{key}" + (f"={_word(value)}" if value is not True else "") for key, value in values.items() if value]
    return ["#!/bin/bash", *(f"#SBATCH {line}" for line in (*lines, *options.sbatch))]


def _word(value: object) -> str:
    return f'"{value}"' if " " in str(value) else str(value)


def _log(job: Job, task: str = "") -> str:
    return f"{job.workdir.replace('%', '%%')}/logs/{job.name}-{'%A_%a' if job.parallel else '%j'}{task}.out"


def _prologue(job: Job, options: Options) -> list[str]:
    host, _, port = options.coordinator.partition(":")
    lines = [
        f"# {job.topology.name}, commit {job.commit}",
        "trap : TERM USR1  # they are for the processes; this shell stays to read their statuses",
        "export PYTHONUNBUFFERED=1",
    ]
    if job.topology.chip.platform == "cpu":
        count = f"--xla_force_host_platform_device_count={job.topology.shape[0]}"
        lines += ["export JAX_PLATFORMS=cpu", f'export XLA_FLAGS="{count} ${{XLA_FLAGS:-}}"']
    lines += [
        f"coordinator={bash(host) if host else _FIRST_HOST}",
        f"export JAX_COORDINATOR_ADDRESS=$coordinator:{port or '$((SLURM_JOB_ID % 4096 + 61440))'}",
        '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK',
    ]
    return lines


def _runs(job: Job) -> list[str]:
    if not job.parallel:
        return [f"run=({_words(arguments(job.runs[0]))})"]
    lines = ['case "$SLURM_ARRAY_TASK_ID" in']
    lines += [f"{index}) run=({_words(arguments(run))}) ;;" for index, run in enumerate(job.runs)]
    return [*lines, "esac"]


def _words(texts: list[str]) -> str:
    return " ".join(map(bash, texts))


def _launch(job: Job, options: Options) -> list[str]:
    statuses = bash(f"{job.workdir}/logs") + '/status-"$SLURM_JOB_ID"'
    output = bash(_log(job, "-%t"))
    return [
        f"statuses={statuses}",
        'rm -rf "$statuses" && mkdir -p "$statuses" || exit 1',
        f"cd {bash(ship.folder(job))} || exit 1",
        f"srun --kill-on-bad-exit=1 --open-mode=append --output={output} \\",
        f'  bash -c {bash(_TASK)} "$statuses" \\',
        f'  {_words(train(options.python, job))} "${{run[@]}}"',
        "status=$?",
        "",
        'for file in "$statuses"/*; do',
        '  [ -s "$file" ] || continue',  # empty: its process was killed as it wrote
        '  one=$(cat "$file")',
        f"  if {FATAL.format('$one')}; then",
        '    echo "process ${file##*/} ended with status $one: not started again"',
        "    exit $one",
        "  fi",
        "done",
        'rm -rf "$statuses"',
        "[ $status = 0 ] && exit 0",
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.restarts} ]; then',
        f'  echo "status $status after {job.restarts} restarts: giving up"',
        "  exit $status",
        "fi",
        # A job that SLURM is ending (cancelled, requeued by hand, preempted) is not for this script to bring back.
        '[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ] || exit $status',
        'echo "status $status: back into the queue"',
        'scontrol requeue "$SLURM_JOB_ID"',
        f"exit {RESTART}",
    ]


def status(record: Record, identifier: str) -> list[Command]:
    """Commands that tell the state of a job; the second where SLURM has forgotten it and keeps accounts."""
    return [
        command("squeue", "--states=all", "--noheader", f"--jobs={identifier}", "--format=%i %T %M of %l, %r %N"),
        command("sacct", "-X", "--noheader", f"--jobs={identifier}", "--format=JobID,State,ExitCode,Elapsed"),
    ]


def logs(record: Record, identifier: str, *, run: int, task: int, lines: int, follow: bool) -> list[Command]:
    """Commands that show the end of the batch script's log and of one process's."""
    job = f"{record.workdir}/logs/{record.name}-{identifier}" + (f"_{run}" if record.parallel else "")
    return [command("tail", "-n", lines, "-F" if follow else None, f"{job}.out", f"{job}-{task}.out")]


def cancel(record: Record, identifier: str) -> Command:
    """The command that ends a job; its processes may save first."""
    return command("scancel", identifier)
