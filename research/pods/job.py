"""A job for a pod, and the files and commands that submit it: the same list is printed by a dry run and carried out.

Exit statuses mean the same on every engine: 0 is done; 42 (state saved, or a host lost) and 128 and up (killed by a
signal) ask for a restart, of which there are at most `restarts`; anything else is a bug or a mistake and ends the job.
"""

import os
import pathlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from research.core import storage
from research.core.errors import RESTART, UserError
from research.pods.chips import Topology

LONGEST_NAME = 36  # leaves room for what the engines append to it
# Shell test of an exit status that ends the job.
FATAL = f"[ {{0}} != 0 ] && [ {{0}} != {RESTART} ] && [ {{0}} -lt 128 ]"


class Run(NamedTuple):
    """One training: its folder and its `--config.key=value` overrides."""

    folder: str
    overrides: tuple[str, ...]


class Job(NamedTuple):
    """What runs where.

    Attributes:
      name: of the job on its engine.
      topology: what each run gets.
      config: `configs/x.py:arg`, from the root of the repository.
      runs: one, or the points of a sweep.
      workdir: the run folder, or that of the sweep: an absolute path or `gs://bucket/folder`.
      commit: full hash of the code to run.
      restarts: how often a run may be started again.
      parallel: runs of a sweep at a time; 0 for a single run.
      staging: local folder for files on their way.
    """

    name: str
    topology: Topology
    config: str
    runs: tuple[Run, ...]
    workdir: str
    commit: str
    restarts: int = 20
    parallel: int = 0
    staging: str = "runs/.jobs"

    @property
    def remote(self) -> bool:
        """Whether the work folder is in an object store."""
        return storage.remote(self.workdir)


class Write(NamedTuple):
    """A file to be written."""

    path: str
    text: str


class Command(NamedTuple):
    """A command to be run here. `submits` says that its output names the job."""

    arguments: tuple[str, ...]
    submits: bool = False

    def __str__(self) -> str:
        return shlex.join(self.arguments)


Step = Write | Command


def command(*arguments: object, submits: bool = False) -> Command:
    """The command of these arguments, those that are None or "" left out."""
    return Command(tuple(str(a) for a in arguments if a not in (None, "")), submits)


def train(python: str, job: Job, run: Run | None = None) -> list[str]:
    """The training command of a job; with `run`, its folder and overrides too."""
    found = [python, "-m", "launch.train", "--distributed", "--config", job.config]
    return [*found, *arguments(run)] if run else found


def arguments(run: Run) -> list[str]:
    """The options of `launch.train` that differ between the runs of a sweep."""
    return ["--workdir", run.folder, *run.overrides]


def describe(steps: Sequence[Step]) -> str:
    """The steps as text: every file whole, every command as one would type it."""
    blocks = []
    for step in steps:
        if isinstance(step, Write):
            blocks.append(f"# {step.path}\n" + "".join(f"| {line}".rstrip() + "\n" for line in step.text.splitlines()))
        else:
            blocks.append(f"$ {step}\n")
    return "\n".join(blocks)


def carry_out(steps: Sequence[Step]) -> str:
    """Does the steps in order; returns what the submitting commands printed.

    Raises UserError with the command and what it said where one fails or is not there, and which jobs were submitted
    before it.
    """
    said: list[str] = []
    submitted: list[Command] = []
    for step in steps:
        if isinstance(step, Write):
            path = pathlib.Path(step.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.text)
            continue
        try:
            words = output(step)
        except UserError as error:
            before = "".join(f"\n  already submitted: {one}" for one in submitted)
            raise UserError(f"{error}{before}") from None
        if step.submits:
            submitted.append(step)
            said.append(words)
    return "\n".join(said)


def output(step: Command) -> str:
    """What a command prints; raises UserError where it fails, quoting its last words."""
    program = step.arguments[0]
    try:
        done = subprocess.run(step.arguments, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError(f"{program}: not installed here, or not on the PATH; needed for: {step}") from None
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise UserError(f"{program} failed with status {done.returncode}: {' '.join(words[-3:])}\n  command: {step}")
    return done.stdout.strip()


def check_name(name: str) -> None:
    """Refuses names that Kubernetes, Cloud or a file system would refuse."""
    if slug(name) != name:
        rule = f"at most {LONGEST_NAME} lower-case letters, digits and single dashes, a letter first"
        raise UserError(f"--name {name!r}: {rule}; try {slug(name)}")


def slug(text: str) -> str:
    """The nearest allowed name: `Runs/KD r50` -> `runs-kd-r50`."""
    found = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (found if found[:1].isalpha() else f"job-{found}")[:LONGEST_NAME].strip("-")


def bash(text: str) -> str:
    """A word of a shell script, quoted where needed."""
    return shlex.quote(os.fspath(text))
