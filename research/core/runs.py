"""Reading run folders: rows, arms, config, environment and cost of finished and unfinished runs.

A run folder holds `config.json`, `metrics.jsonl`, `environment.json` and, where it was counted, `cost.json`. A row of
`metrics.jsonl` is {"step", "time", "kind": train | eval | done, "<name>": number, ...}. A run that trains several
students in one step writes `eval/<arm>/<metric>`; a run of one network writes `eval/<metric>`, and its arm is "".
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from research.core import storage
from research.core.errors import UserError

CONFIG, METRICS, ENVIRONMENT, COST = "config.json", "metrics.jsonl", "environment.json", "cost.json"
SERIES = ("eval", "train")
TEACHER = "teacher"  # a network that is evaluated for reference and takes no part in the comparison
SECONDS, MEMORY = "train/seconds_per_step", "train/memory_gb"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder. `rows` are in the order of their steps, each (kind, step) once; `config` is {} where unknown."""

    folder: storage.Path
    config: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    environment: dict[str, Any]
    cost: dict[str, Any]
    problems: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the last row says that training reached its end."""
        return bool(self.rows) and self.rows[-1].get("kind") == "done"

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before any."""
        return max((row["step"] for row in self.rows), default=0)

    @functools.cached_property
    def series(self) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
        """(`eval` or `train`, arm, metric) -> (step, value) in order; NaN and infinite values are left out."""
        found: dict[tuple[str, str, str], dict[int, float]] = {}
        arms = self._named_arms()
        for row in self.rows:
            for name, value in row.items():
                key = _split(name, arms)
                if key and isinstance(value, (int, float)) and math.isfinite(value):
                    found.setdefault(key, {})[row["step"]] = float(value)
        return {key: sorted(points.items()) for key, points in found.items()}

    @property
    def arms(self) -> list[str]:
        """The students evaluated, in the order of their first row; [""] for a run of one."""
        return list(dict.fromkeys(arm for kind, arm, _ in self.series if kind == "eval")) or [""]

    def last(self, arm: str) -> dict[str, float]:
        """The metrics of the last evaluation of `arm`: the last one, not the best."""
        points = {metric: values[-1] for (kind, a, metric), values in self.series.items() if (kind, a) == ("eval", arm)}
        newest = max((step for step, _ in points.values()), default=0)
        return {metric: value for metric, (step, value) in points.items() if step == newest}

    def seconds_per_step(self) -> float | None:
        """Median seconds a training step over the logged rows but the first, which holds the compilation."""
        logged = [row[SECONDS] for row in self.rows if row.get(SECONDS)]
        return statistics.median(logged[1:] or logged) if logged else None

    def examples_per_second(self) -> float | None:
        """Global examples a second of training, from the batch size and the time a step."""
        seconds = self.seconds_per_step()
        return self.config["batch_size"] / seconds if seconds and self.config.get("batch_size") else None

    def seconds(self) -> float | None:
        """Seconds from the first row to the last, evaluations included; pauses of a resumed run count too."""
        times = [row["time"] for row in self.rows]
        steps = (max(later - earlier, 0.0) for earlier, later in itertools.pairwise(times))  # a clock may be set back
        return sum(steps) if len(times) > 1 else None

    def memory_gb(self) -> float | None:
        """Most memory in use, as logged."""
        return max((row[MEMORY] for row in self.rows if row.get(MEMORY)), default=None)

    def cost_of(self, arm: str) -> dict[str, Any]:
        """`params` and `macs` of the network of `arm`: the entry of that name in `cost.json`, or its only content."""
        own = self.cost.get(arm, self.cost)
        return own if isinstance(own, dict) else {}

    def _named_arms(self) -> set[str]:
        """The names that stand for a network in a metric's name: the config's students, else whatever has a metric.

        A further form of a student, such as the merged one that deep training scores, is named `<student>_<form>`.
        """
        parts = [name.split("/") for row in self.rows for name in row if name.startswith("eval/")]
        scored = {p[1] for p in parts if len(p) >= 3 and not p[1].startswith("ema")}
        students = self.config.get("students")
        if isinstance(students, dict) and students:
            return {*students, TEACHER} | {name for name in scored if name.startswith(tuple(f"{s}_" for s in students))}
        return scored


def _split(name: str, arms: set[str]) -> tuple[str, str, str] | None:
    kind, _, rest = name.partition("/")
    if kind not in SERIES or not rest:
        return None
    parts = rest.split("/")
    arm = next((part for part in parts if part in arms), "") if len(parts) > 1 else ""
    if arm:
        parts.remove(arm)
    return kind, arm, "/".join(parts)


def read(folder: str | os.PathLike) -> Run:
    """Reads a run folder; what is missing or broken in it is listed in `problems`.

    Raises UserError where the folder holds neither a config nor metrics.
    """
    folder = storage.folder(folder)
    if not any((folder / name).is_file() for name in (CONFIG, METRICS)):
        raise UserError(f"{folder}: no run here ({CONFIG} and {METRICS} are missing)")
    problems: list[str] = []
    objects = {name: _object(folder / name, problems) for name in (CONFIG, ENVIRONMENT, COST)}
    rows = _rows(folder / METRICS, problems)
    return Run(folder, objects[CONFIG], rows, objects[ENVIRONMENT], objects[COST], tuple(problems))


def finished(folder: str | os.PathLike) -> bool:
    """Whether the run in `folder` reached its end; False for a folder that is not there."""
    return any(row.get("kind") == "done" for row in _rows(storage.folder(folder) / METRICS, [])[-1:])


def find(paths: Sequence[str | os.PathLike]) -> list[storage.Path]:
    """The run folders at and under `paths`, in order, each once.

    Raises FileNotFoundError for a path that does not exist, UserError for one with no run under it.
    """
    found: dict[storage.Path, None] = {}
    for path in map(storage.folder, paths):
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such run folder")
        own = [path] if any((path / name).is_file() for name in (CONFIG, METRICS)) else []
        runs = own or sorted({f.parent for f in storage.files(path) if f.name in (CONFIG, METRICS)}, key=_natural)
        # A run may keep another inside its folder, such as the teacher it trained first: that one is not compared.
        runs = [run for run in runs if not any(parent in runs for parent in run.parents)]
        if not runs:
            raise UserError(f"{path}: no run here; a run folder holds {CONFIG} and {METRICS}")
        found.update(dict.fromkeys(runs))
    return list(found)


def _natural(path: storage.Path) -> list[tuple[int, int, str]]:
    """Sort key that puts seed=2 before seed=10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in _parts(str(path))]


def _parts(text: str) -> Iterator[str]:
    digits = [i for i in range(1, len(text)) if text[i].isdecimal() != text[i - 1].isdecimal()]
    for start, end in zip([0, *digits], [*digits, len(text)], strict=True):
        yield text[start:end]


def _object(file: storage.Path, problems: list[str]) -> dict[str, Any]:
    if not file.is_file():
        if file.name != COST:
            problems.append(f"{file.name} is missing")
        return {}
    try:
        value = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        problems.append(f"{file.name} is not JSON")
        return {}
    return value if isinstance(value, dict) else {}


def _rows(file: storage.Path, problems: list[str]) -> tuple[dict[str, Any], ...]:
    """The rows by step. A resumed run repeats the steps after its checkpoint: the later row of a step stands."""
    if not file.is_file():
        problems.append(f"{file.name} is missing")
        return ()
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    broken = 0
    for line in file.read_bytes().decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
            rows[str(row.get("kind")), int(row["step"])] = row
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            broken += bool(line.strip())
    if broken:
        problems.append(f"{file.name} has {broken} unreadable line{'s' if broken > 1 else ''}")
    order = {"train": 0, "eval": 1, "done": 2}
    return tuple(sorted(rows.values(), key=lambda row: (row["step"], order.get(row.get("kind"), 1))))
