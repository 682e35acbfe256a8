"""Runs one config many times, over a grid or a list of overrides: `python -m launch.sweep --help`.

    python -m launch.sweep --config configs/x.py --workdir runs/x --sweep.student.loss=kd,dkd,dist --sweep.seed=0,1,2

Every run is a process of its own in a folder of its own, `runs/x/loss=kd/seed=0`. Run the same command again to resume
what is missing, or with further values to add them. Arms that differ in the method (see research.core.compare) may
differ in nothing else; without seeds such a comparison gets three.
"""

import argparse
import contextlib
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from launch import report
from research.core import config as configs
from research.core import sweeps
from research.core.errors import RESTART, UserError, cli
from research.core.overrides import PREFIX

AXIS = "--sweep."
TRAINER = (sys.executable, "-m", "launch.train")
LOG = "log.txt"


class Children:
    """The processes now running, and whether the sweep was told to stop."""

    def __init__(self):
        self.stopping = False
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()

    def run(self, command: Sequence[str], log: pathlib.Path, prefix: str, lines: queue.SimpleQueue) -> int:
        """Runs one process to its end; its output goes to the log file and, line by line with a prefix, to `lines`."""
        with self._lock:
            if self.stopping:
                return RESTART
            child = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            self._running.add(child)
        if self.stopping:  # told so while the process was being started
            child.terminate()
        log.parent.mkdir(parents=True, exist_ok=True)
        with child, log.open("a") as file:
            for line in child.stdout:
                file.write(line)
                lines.put(f"{prefix}{line.rstrip()}")
        with self._lock:
            self._running.discard(child)
        return child.returncode

    def stop(self, number: int) -> None:
        """Starts no more and passes the signal on."""
        self.stopping = True
        for child in list(self._running):
            child.send_signal(number)


@contextlib.contextmanager
def _signals(children: Children) -> Iterator[None]:
    """SIGTERM and SIGUSR1 go to the runs, which save and leave."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {n: signal.signal(n, lambda n, _: children.stop(n)) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def execute(
    workdir: pathlib.Path, plan: sweeps.Plan, pending: Sequence[sweeps.Planned], trainer: Sequence[str], parallel: int
) -> dict[str, int]:
    """Runs what is pending, `parallel` at a time; returns folder -> exit status. One failure does not stop the rest."""
    children, lines = Children(), queue.SimpleQueue()
    width = max((len(run.folder) for run in pending), default=0)

    def one(number: int, run: sweeps.Planned) -> int:
        if children.stopping:
            return RESTART
        folder = workdir / run.folder
        options = ["--config", plan.config, "--workdir", str(folder), *plan.base, *sweeps.overrides(run.overrides)]
        lines.put(f"[{number}/{len(pending)}] {run.folder}")
        start = time.monotonic()
        status = children.run([*trainer, *options], folder / LOG, f"{run.folder:<{width}} | ", lines)
        outcome = {0: "done", RESTART: "stopped"}.get(status, f"FAILED with status {status}")
        lines.put(f"[{number}/{len(pending)}] {run.folder}: {outcome} after {time.monotonic() - start:.0f} s")
        return status

    with _signals(children), ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(one, number, run) for number, run in enumerate(pending, 1)]
        threading.Thread(target=lambda: ([f.exception() for f in futures], lines.put(None)), daemon=True).start()
        try:
            while (line := lines.get()) is not None:
                print(line, flush=True)
        except KeyboardInterrupt:
            children.stop(signal.SIGINT)
            raise
    return {run.folder: future.result() for run, future in zip(pending, futures, strict=True)}


def points(extra: Sequence[str], file: str | None) -> list[dict[str, str]]:
    """The points of the grid `--sweep.key=a,b`, times those of the list file where there is one."""
    axes: dict[str, list[str]] = {}
    for text in extra:
        key, _, values = text.removeprefix(AXIS).partition("=")
        if key in axes:
            raise UserError(f"{AXIS}{key} is given twice; write all values in one: {AXIS}{key}=a,b")
        axes[key] = sweeps.split(values)
    listed = sweeps.read_list(file) if file else [{}]
    if both := sorted(set(axes) & {key for point in listed for key in point}):
        raise UserError(f"{AXIS}{both[0]} is also set by {file}; keep one of them")
    return [{**point, **more} for point in listed for more in sweeps.grid(axes)] if axes or file else []


def describe(plan: sweeps.Plan, pending: Sequence[sweeps.Planned]) -> str:
    """What will run, in a few lines."""
    kind = "comparison of methods" if plan.comparison else "search" if plan.keys else "repetition over seeds"
    seeds = ", ".join(map(str, plan.seeds))
    text = f"{kind}: {len(plan.arms)} arm{'s' * (len(plan.arms) > 1)}, seed {seeds}; {len(plan.runs)} runs"
    done = len(plan.runs) - len(pending)
    text += f", {done} finished" if done else ""
    if plan.comparison and len(plan.seeds) < 3:
        text += "\nnote: fewer than three seeds say little about the spread; add --sweep.seed=0,1,2"
    return text


def parser() -> argparse.ArgumentParser:
    """The options of the sweep itself."""
    found = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the config of all runs")
    found.add_argument("--workdir", required=True, help="the folder of the sweep")
    found.add_argument("--list", metavar="FILE", help="JSON list of points, each an object of overrides key: value")
    found.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (1)")
    found.add_argument("--report", action="store_true", help="when all runs are finished, report them (launch.report)")
    found.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    found.add_argument("--traceback", action="store_true", help="show where an error arose")
    found.epilog = "also: --sweep.KEY=VALUE,VALUE... an axis of the grid; --config.KEY=VALUE an override of all runs"
    return found


@cli
def main(argv: list[str] | None = None, trainer: Sequence[str] = TRAINER) -> int:
    options, extra = configs.parse_args(parser(), argv, prefixes=(PREFIX, AXIS))
    if options.parallel < 1:
        raise UserError(f"--parallel {options.parallel}: must be 1 or more")
    base = [text for text in extra if text.startswith(PREFIX)]
    grid = points([text for text in extra if text.startswith(AXIS)], options.list)
    workdir = pathlib.Path(options.workdir)
    old, plan = sweeps.load(workdir), sweeps.plan(options.config, grid, base)
    plan = sweeps.merge(old, plan) if old else plan
    pending = sweeps.pending(workdir, plan)
    print(describe(plan, pending), flush=True)
    if options.dry_run:
        print("\n".join(run.folder for run in pending))
        return 0
    sweeps.save(workdir, plan, ["python", "-m", "launch.sweep", *argv])
    status = execute(workdir, plan, pending, trainer, options.parallel)
    failed = [folder for folder, code in status.items() if code not in (0, RESTART)]
    for folder in failed:
        print(f"sweep: {folder} failed; see {workdir / folder / LOG}", file=sys.stderr)
    if failed:
        return 1
    if RESTART in status.values():
        print(f"sweep: stopped; resume with {shlex.join(['python', '-m', 'launch.sweep', *argv])}", file=sys.stderr)
        return RESTART
    if options.report:
        return report.main([os.fspath(workdir)])
    print(f"all runs are finished; python -m launch.report {os.fspath(workdir)} makes the report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
