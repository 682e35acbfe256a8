"""Submits a training, or a sweep of them, to SLURM, GKE or TPU VMs; checks first that it can work.

    python -m launch.submit --engine slurm --topology h200:8x4 --config configs/distill/vanilla_kd_r50_a2.py \\
        --workdir /shared/runs/kd --time 24:00:00 --config.data.path=/shared/imagenet
    python -m launch.submit status|logs|cancel NAME
    python -m launch.submit list

Before anything is submitted the config is loaded and compiled for the topology, the work folder written to, and the
tree compared with the commit that will run. `--dry-run` prints every file and command instead, and runs none.
"""

import argparse
import datetime
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import ModuleType

from launch import sweep
from research.core import config as configs
from research.core import storage, sweeps
from research.core.errors import UserError, cli
from research.core.overrides import PREFIX, suggest
from research.pods import chips, gke, job, precheck, records, ship, slurm, tpu_vm

ENGINES: dict[str, ModuleType] = {"slurm": slurm, "gke": gke, "tpu-vm": tpu_vm}
VERBS = ("status", "logs", "cancel", "list")


def parser() -> argparse.ArgumentParser:
    """The options of a submission. Those of the engines default to None, so that one given for another is seen."""
    found = argparse.ArgumentParser(
        prog="python -m launch.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--engine", required=True, metavar="NAME", help=", ".join(ENGINES))
    add("--topology", required=True, help="what each run gets: v5e:16x16, v5p-512, h200:8x4, cpu:2x2")
    add("--config", required=True, metavar="FILE[:ARG]", help="a config of the repository")
    add("--workdir", required=True, help="run folder, or that of the sweep: a shared folder or gs://bucket/folder")
    add("--name", help="of the job; by default the work folder's")
    add("--commit", default="HEAD", help="code to run (HEAD)")
    add("--dirty-ok", action="store_true", help="leave uncommitted changes behind")
    add("--restarts", type=int, default=20, metavar="N", help="most restarts of a run (20)")
    add("--list", metavar="FILE", help="sweep: JSON list of points, each an object of overrides key: value")
    add("--parallel", type=int, metavar="N", help="sweep: runs at a time (all; a limit needs SLURM)")
    add("--jobs", default=records.FOLDER, metavar="DIR", help=f"where jobs are remembered ({records.FOLDER})")
    add("--no-check", action="store_true", help="do not compile first")
    add("--dry-run", action="store_true", help="print the files and commands, and stop")
    add("--traceback", action="store_true", help="show where an error arose")
    add = found.add_argument_group("options of engines").add_argument
    add("--python", help="slurm, gke: interpreter (slurm: this one); tpu-vm: its version (3.11)")
    add("--grace", type=int, metavar="SECONDS", help="slurm, gke: from the warning to the end, to save in (300)")
    add("--partition", help="slurm")
    add("--account", help="slurm")
    add("--time", help="slurm: limit of one start, as 24:00:00")
    add("--coordinator", metavar="HOST[:PORT]", help="slurm: of the first process, where node names do not resolve")
    add("--sbatch", action="append", metavar="OPTION", help="slurm: any further option, as --sbatch=--exclusive")
    add("--project", help="gke, tpu-vm")
    add("--zone", help="gke, tpu-vm")
    add("--spot", action="store_true", default=None, help="gke, tpu-vm: machines that may be taken away")
    add("--cluster", help="gke")
    add("--image", help="gke: container with Python and this project's requirements")
    add("--machine-type", help="gke: where the topology leaves a choice")
    add("--storage", help="gke: storages of xpk to mount")
    add("--reservation", help="gke: name of a reservation")
    add("--shared-filesystem", action="store_true", default=None, help="gke: the work folder is mounted there too")
    add("--runtime-version", help="tpu-vm: software version (the topology's)")
    add("--reserved", action="store_true", default=None, help="tpu-vm: reserved machines")
    add("--service-account", help="tpu-vm: that reads and writes the work folder (Compute Engine's)")
    add("--network", help="tpu-vm")
    found.epilog = (
        "also: --config.KEY=VALUE an override; --sweep.KEY=VALUE,VALUE... an axis of a sweep, one run a point"
    )
    return found


def engine_options(name: str, given: argparse.Namespace) -> tuple[ModuleType, tuple]:
    """The engine of a name and its options; raises UserError for another engine's, naming what does take them."""
    if name not in ENGINES:
        raise UserError(f"--engine {name}: not one{suggest(name, list(ENGINES))} (there are {', '.join(ENGINES)})")
    engine, values = ENGINES[name], vars(given)
    for option in dict.fromkeys(field for e in ENGINES.values() for field in e.Options._fields):
        if values[option] is not None and option not in engine.Options._fields:
            owners = [other for other, e in ENGINES.items() if option in e.Options._fields]
            raise UserError(f"--{option.replace('_', '-')}: not for {name}, only for {' and '.join(owners)}")
    own = {option: values[option] for option in engine.Options._fields if values[option] is not None}
    if name == "slurm":
        own = {"python": sys.executable, **own, "sbatch": tuple(own.get("sbatch", ()))}
    return engine, engine.Options(**own)


def build(given: argparse.Namespace, extra: Sequence[str], root: pathlib.Path) -> tuple[job.Job, sweeps.Plan | None]:
    """The job that the options describe, and the plan of its sweep. Every mistake in them is found here."""
    topology = chips.parse(given.topology)
    commit = ship.commit(root, given.commit)
    workdir = given.workdir.rstrip("/") if storage.remote(given.workdir) else os.path.abspath(given.workdir)
    name = given.name or job.slug(os.path.basename(workdir))
    job.check_name(name)
    if given.restarts < 0:
        raise UserError(f"--restarts {given.restarts}: must be 0 or more")
    base = tuple(text for text in extra if text.startswith(PREFIX))
    axes = [text for text in extra if text.startswith(sweep.AXIS)]
    config = ship.config(root, commit, given.config)
    runs, parallel, plan = (job.Run(workdir, base),), 0, None
    if axes or given.list:
        plan = sweeps.plan(config, sweep.points(axes, given.list), base)
        runs, plan = _pending(workdir, plan, given.dry_run)
        parallel = len(runs) if given.parallel is None else given.parallel
        if parallel < 1:
            raise UserError(f"--parallel {parallel}: must be 1 or more")
    elif given.parallel is not None:
        raise UserError(f"--parallel {given.parallel}: there is one run; --sweep.key=a,b makes several")
    else:
        resolved = configs.load(config, base)
        if not storage.remote(workdir) and (lines := configs.mismatch(workdir, resolved)):
            raise UserError(f"{workdir} belongs to a run with another config:\n  " + "\n  ".join(lines))
    return job.Job(name, topology, config, runs, workdir, commit, given.restarts, parallel, given.jobs), plan


def _pending(workdir: str, plan: sweeps.Plan, dry: bool) -> tuple[tuple[job.Run, ...], sweeps.Plan]:
    """The runs of a sweep that are not finished, and the plan grown by what the folder holds already."""
    left: Sequence[sweeps.Planned] = plan.runs
    if not (dry and storage.remote(workdir)):  # a dry run asks no store
        old = sweeps.load(workdir)
        plan = sweeps.merge(old, plan) if old else plan
        left = sweeps.pending(workdir, plan)
    if not left:
        raise UserError(f"{workdir}: all {len(plan.runs)} runs of the sweep are finished")
    print(sweep.describe(plan, left))
    runs = (job.Run(f"{workdir}/{r.folder}", (*plan.base, *sweeps.overrides(r.overrides))) for r in left)
    return tuple(runs), plan


def plan_steps(found: job.Job, plan: sweeps.Plan, command: Sequence[str]) -> list[job.Step]:
    """Steps that leave the plan of a sweep in its folder, where launch.sweep and launch.report look for it."""
    with tempfile.TemporaryDirectory() as folder:
        sweeps.save(folder, plan, command)
        return ship.place(found, sweeps.FILE, (pathlib.Path(folder) / sweeps.FILE).read_text())


def submit(argv: Sequence[str]) -> int:
    """Checks, ships and submits; or prints what that would be."""
    given, extra = configs.parse_args(parser(), argv, prefixes=(PREFIX, sweep.AXIS))
    engine, options = engine_options(given.engine, given)
    root = ship.repository()
    found, plan = build(given, extra, root)
    engine.check(found, options)
    records.check_free(given.jobs, found.name, found.workdir)
    if not given.dirty_ok and found.commit == ship.commit(root):
        ship.check_clean(root)
    command = ["python", "-m", "launch.submit", *(text for text in argv if text != "--dry-run")]
    checks = [] if given.no_check else precheck.commands(found, plan)
    steps = engine.submit(found, options, root)
    last = [step for step in steps if isinstance(step, job.Command) and step.submits]
    first = [step for step in steps if step not in last]
    # The plan comes late: it would bind the folder to a sweep that does not fit.
    last = [*(plan_steps(found, plan, command) if plan else []), *last]
    if given.dry_run:
        print(job.describe([*first, *checks, *last]), end="")
        return 0
    if not found.remote:
        ship.probe(found.workdir)
    job.carry_out(first)
    if checks:
        precheck.run(checks, root, found.commit)
    said = job.carry_out(last)
    record = remember(found, given.engine, engine.identifiers(found, said), options, command)
    records.save(given.jobs, record)
    print(f"{found.name}: submitted as {', '.join(record.identifiers)}")
    print(f"python -m launch.submit status {found.name}")
    return 0


def remember(found: job.Job, engine: str, identifiers: list[str], options: tuple, command: list[str]) -> records.Record:
    """The record of a job that was just submitted."""
    return records.Record(
        name=found.name,
        engine=engine,
        identifiers=identifiers,
        topology=found.topology.name,
        config=found.config,
        workdir=found.workdir,
        folders=[run.folder for run in found.runs],
        parallel=found.parallel,
        commit=found.commit,
        submitted=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        options=options._asdict(),
        command=command,
    )


def ask_parser() -> argparse.ArgumentParser:
    """The options of the questions about jobs."""
    found = argparse.ArgumentParser(prog="python -m launch.submit", allow_abbrev=False)
    found.add_argument("verb", choices=VERBS)
    found.add_argument("name", nargs="?")
    found.add_argument("--jobs", default=records.FOLDER, metavar="DIR", help="where jobs are remembered")
    found.add_argument("--run", type=int, default=0, metavar="N", help="logs: run of a sweep, from 0")
    found.add_argument("--task", type=int, default=0, metavar="N", help="logs: process, from 0")
    found.add_argument("--lines", type=int, default=50, metavar="N", help="logs: how many")
    found.add_argument("--follow", action="store_true", help="logs: wait for more")
    found.add_argument("--dry-run", action="store_true", help="print the commands, and stop")
    return found


def ask(argv: Sequence[str]) -> int:
    """status, logs, cancel, list."""
    given, _ = configs.parse_args(ask_parser(), argv, prefixes=())
    if given.verb == "list" or not given.name:
        for record in records.every(given.jobs):
            print(f"{record.name}  {record.engine} {record.topology}  {record.submitted}  {record.workdir}")
        if given.verb != "list":
            raise UserError(f"{given.verb}: of which job? `list` names them")
        return 0
    record = records.load(given.jobs, given.name)
    engine = ENGINES[record.engine]
    if given.verb == "logs":
        if not 0 <= given.run < len(record.folders):
            raise UserError(f"--run {given.run}: {record.name} has {len(record.folders)} runs, numbered from 0")
        one = record.identifiers[min(given.run, len(record.identifiers) - 1)]
        asked = [engine.logs(record, one, run=given.run, task=given.task, lines=given.lines, follow=given.follow)]
    elif given.verb == "status":
        asked = [engine.status(record, one) for one in record.identifiers]
    else:
        asked = [[engine.cancel(record, one)] for one in record.identifiers]
    if given.dry_run:
        print("\n".join(f"$ {command}" for commands in asked for command in commands))
        return 0
    found = [_first(commands, stream=given.verb == "logs") for commands in asked]  # all of them, also where one fails
    if given.verb == "status" and not storage.remote(record.workdir):
        print("\n".join(records.progress(record.folders)))
    return 0 if all(found) else 1


def _first(commands: Sequence[job.Command], *, stream: bool) -> bool:
    """Runs commands until one has something to say; whether one had. `stream` lets it speak while it runs."""
    complaints = []
    for command in commands:
        try:
            done = subprocess.run(command.arguments, stdout=None if stream else subprocess.PIPE, text=True)
        except FileNotFoundError:
            complaints.append(f"{command.arguments[0]}: not installed here")
            continue
        if done.returncode == 0 and (stream or done.stdout.strip() or len(commands) == 1):
            print(done.stdout or "", end="", flush=True)
            return True
        complaints.append(f"no answer from: {command}")
    print("\n".join(complaints), file=sys.stderr)
    return False


@cli
def main(argv: list[str]) -> int:
    return ask(argv) if argv and argv[0] in VERBS else submit(argv)


if __name__ == "__main__":
    sys.exit(main())
