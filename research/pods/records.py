"""What was submitted, to ask about it later: one small JSON file a job, in a local folder."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from research.core import runs, storage
from research.core.config import suggest
from research.core.errors import UserError

FOLDER = "runs/.jobs"


class Record(NamedTuple):
    """A submitted job.

    Attributes:
      identifiers: the engine's names or numbers of it, one or, where it has no arrays, one a run.
      folders: the run folders, in the order of the array.
      parallel: runs of a sweep at a time, 0 for a single run.
      submitted: when, ISO 8601.
      options: the engine's, by name.
      command: the arguments given to `launch.submit`.
    """

    name: str
    engine: str
    identifiers: list[str]
    topology: str
    config: str
    workdir: str
    folders: list[str]
    parallel: int
    commit: str
    submitted: str
    options: dict[str, Any]
    command: list[str]


def save(folder: str | os.PathLike, record: Record) -> pathlib.Path:
    """Writes a record, replacing one of that name; returns its file."""
    file = pathlib.Path(folder) / f"{record.name}.json"
    storage.write(file, json.dumps(record._asdict(), indent=2) + "\n")
    return file


def load(folder: str | os.PathLike, name: str) -> Record:
    """The record of a name; raises UserError where there is none (naming the nearest) or it is broken."""
    file = pathlib.Path(folder) / f"{name}.json"
    if not file.is_file():
        names = [record.name for record in every(folder)]
        near = suggest(name, names) or (f" (there are {', '.join(names)})" if names else "")
        raise UserError(f"{name}: no job of that name in {folder}{near}")
    try:
        return Record(**json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{file}: not a record of a job; delete it") from None


def every(folder: str | os.PathLike) -> list[Record]:
    """All records, the newest last."""
    names = sorted(file.stem for file in pathlib.Path(folder).glob("*.json"))
    return sorted((load(folder, name) for name in names), key=lambda record: record.submitted)


def check_free(folder: str | os.PathLike, name: str, workdir: str) -> None:
    """Refuses a name that another folder's job has; a job of the same folder is submitted again under its own."""
    if (pathlib.Path(folder) / f"{name}.json").is_file() and (old := load(folder, name)).workdir != workdir:
        raise UserError(f"--name {name}: is the job of {old.workdir}; give this one another --name")


def progress(folders: Sequence[str]) -> list[str]:
    """How far each run has come, by its own log."""
    return [f"{folder}: {_progress(folder)}" for folder in folders]


def _progress(folder: str) -> str:
    try:
        run = runs.read(folder)
    except UserError as error:
        return "not started" if "no run here" in str(error) else str(error)
    return f"finished, step {run.step}" if run.finished else f"step {run.step}"
