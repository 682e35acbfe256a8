"""Compiling what a job will run before it is submitted, by `launch.compile` in a process of its own."""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from research.core import sweeps
from research.core.errors import UserError
from research.pods import ship
from research.pods.job import Command, Job, Run, carry_out, command

OUT_OF_MEMORY = 3  # exit status of launch.compile


def commands(found: Job, plan: sweeps.Plan | None) -> list[Command]:
    """The commands that compile what will run, ahead of time: every arm of a sweep once, whatever its seed."""
    names = {f"{found.workdir}/{planned.folder}": planned.arm for planned in plan.runs} if plan else {}
    arms: dict[str, Run] = {}
    for one in found.runs:
        arms.setdefault(names.get(one.folder, ""), one)
    base = (sys.executable, "-m", "launch.compile", "--config", found.config, "--topology", found.topology.name)
    return [command(*base, *one.overrides, "--json") for one in arms.values()]


def run(commands: Sequence[Command], root: pathlib.Path, commit: str) -> None:
    """Compiles in a copy of the commit, so that what is checked is what will run.

    Raises UserError where it does not fit, with what to change, or does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        packed = f"{folder}/code.tar.gz"
        carry_out([ship.archive(root, commit, packed), command("tar", "-xzf", packed, "-C", folder)])
        for one in commands:
            print(f"checking: {one}", flush=True)
            done = subprocess.run(one.arguments, cwd=folder, capture_output=True, text=True)
            print(_verdict(done, one), flush=True)


def _verdict(done: subprocess.CompletedProcess, command: Command) -> str:
    report = _last_object(done.stdout)
    if done.returncode == 0 and report.get("fits"):
        return f"fits: {report['peak_bytes'] / 1e9:.3g} of {report['hbm_bytes'] / 1e9:.3g} GB a chip"
    if done.returncode == OUT_OF_MEMORY:
        need = f"{report.get('peak_bytes', 0) / 1e9:.3g} of {report.get('hbm_bytes', 0) / 1e9:.3g} GB a chip"
        tips = "".join(f"\n  {tip}" for tip in report.get("suggestions", ()))
        raise UserError(f"OUT OF MEMORY on {report.get('topology')}: {need}; nothing was submitted{tips}")
    words = (done.stderr.strip() or "it said nothing").splitlines()[-1]
    raise UserError(
        f"does not compile, nothing was submitted: {words}\n  command: {command}\n  (--no-check skips this)"
    )


def _last_object(text: str) -> dict:
    start = 0 if text.startswith("{") else text.rfind("\n{") + 1
    with contextlib.suppress(json.JSONDecodeError):
        found = json.loads(text[start:])
        return found if isinstance(found, dict) else {}
    return {}
