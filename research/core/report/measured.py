"""Measured costs of the arms of a comparison, kept beside its runs: what a step of each would take on its own.

Arms that train side by side share a step, so their runs cannot tell. `launch.report --measure` times them and writes
`measured.json`, in which every arm is known by what its cost depends on, so arms of one run and runs of one arm read
the same.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from research.core import storage
from research.core.errors import UserError

FILE = "measured.json"
# Of a student and a teacher, what the cost of a step does not depend on.
_FREE = ("weights", "recipe", "workdir")


class Measured(NamedTuple):
    """Times in seconds, the median over rounds, of one arm on one machine.

    Attributes:
      device: where it was measured, in words; date: when.
      step: the arm's training step, without the teacher.
      teacher: the teacher's forward pass; 0 without one.
      losses: value and gradient of the arm's losses by themselves; 0 for an arm of labels.
      bytes: memory over that of a step without the losses.
      params: trained parameters of the adaptors.
    """

    device: str
    date: str
    step: float
    teacher: float
    losses: float
    bytes: int
    params: int


def identity(config: Mapping[str, Any], arm: str) -> dict[str, Any] | None:
    """What the cost of an arm depends on, of a config as its run folder holds it; None where there is no such arm."""
    student = (config.get("students") or {}).get(arm)
    if not isinstance(student, Mapping):
        return None
    teacher = config.get("teacher") or {}
    sides = {"student": student, "teacher": teacher}
    found = {name: {k: v for k, v in side.items() if k not in _FREE} for name, side in sides.items()}
    return found | {"batch_size": config.get("batch_size"), "size": (config.get("augment") or {}).get("size")}


def read(paths: Iterable[str | os.PathLike]) -> list[tuple[dict[str, Any], Measured]]:
    """(identity, measured) of the arms in the `measured.json` of these folders.

    Raises UserError where such a file is broken.
    """
    found = []
    for path in paths:
        file = storage.folder(path) / FILE
        if not file.is_file():
            continue
        try:
            found += [(row["of"], Measured(**row["measured"])) for row in json.loads(file.read_text())]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{file}: not what launch.report --measure writes; delete it and measure again") from None
    return found


def write(folder: str | os.PathLike, rows: Iterable[tuple[dict[str, Any], Measured]]) -> None:
    """Writes `measured.json`, whole or not at all."""
    content = [{"of": identity, "measured": measured._asdict()} for identity, measured in rows]
    storage.write(storage.folder(folder) / FILE, json.dumps(content, indent=2) + "\n")


def lookup(rows: Iterable[tuple[dict[str, Any], Measured]], config: Mapping[str, Any], arm: str) -> Measured | None:
    """The measurement of an arm of a run's config."""
    wanted = identity(config, arm)
    return next((measured for own, measured in rows if own == wanted), None) if wanted else None
