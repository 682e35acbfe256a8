"""Plans of many runs of one config: a grid or a list over its keys, with seeds, checked before any run starts."""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from research.core import compare, runs, storage
from research.core import config as configs
from research.core.errors import UserError
from research.core.overrides import PREFIX

FILE = "sweep.json"
SEEDS = ("0", "1", "2")
NAME = "arm"


class Planned(NamedTuple):
    """One run: its arm and seed, its folder inside the sweep's, and its overrides `key -> text`."""

    arm: str
    seed: int | None
    folder: str
    overrides: dict[str, str]


class Plan(NamedTuple):
    """A sweep: the config argument, overrides shared by all runs, the keys that vary, and the runs.

    `comparison` says that the arms differ in the method, so nothing else may; False is a search over other options.
    """

    config: str
    base: tuple[str, ...]
    keys: tuple[str, ...]
    comparison: bool
    runs: tuple[Planned, ...]

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))

    @property
    def seeds(self) -> list[int | None]:
        return list(dict.fromkeys(run.seed for run in self.runs))


def split(text: str) -> list[str]:
    """The values of an axis: `kd,dkd` or `(0.9,0.99),(0.8,0.9)`; commas inside brackets do not separate."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def grid(axes: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """All combinations of the axes' values, the last axis fastest."""
    for key, values in axes.items():
        if len(set(values)) != len(values) or list(values) == [""]:
            raise UserError(f"--sweep.{key}={','.join(values)}: give its values, each once")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def read_list(file: str | os.PathLike) -> list[dict[str, str]]:
    """The points of a JSON file: a list of objects key -> value, where the key `arm` may name the point."""
    try:
        points = json.loads(pathlib.Path(file).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
        raise UserError(f'{file}: expected a list of objects such as [{{"student.loss": "kd", "seed": 0}}]')
    return [{key: _text(value) for key, value in point.items()} for point in points]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def plan(config: str, points: Sequence[Mapping[str, str]], base: Sequence[str] = ()) -> Plan:
    """The runs of a sweep over `points`, each a set of overrides, checked before any of them starts.

    A comparison of methods without seeds gets three; a search without seeds keeps the config's.

    Args:
      config: the config argument, `configs/x.py:arg`.
      points: overrides `key -> text`; `seed` is a key like any other, `arm` names the point.
      base: `--config.key=value` overrides of all runs.
    Raises:
      UserError: a key or value is wrong, two runs are the same, or the arms are not fair to each other.
    """
    if not points:
        raise UserError("nothing to sweep: give --sweep.key=value1,value2 or --list file.json")
    resolved = [_leaves(config, point, base) for point in points]
    patterns = compare.method_keys(configs.plain(configs.load(config, base)))
    vary = compare.varying(resolved)
    comparison = any(compare.matches(key, patterns) for key in vary)
    if comparison and not any(compare.SEED in point for point in points):
        points = [{**point, compare.SEED: seed} for point in points for seed in SEEDS]
        resolved = [_leaves(config, point, base) for point in points]
    # Arms are named by the keys the user gave; a value derived from them varies too but needs no name.
    keys = [k for k in dict.fromkeys(key for point in points for key in point) if k not in (compare.SEED, NAME)]
    planned = [_planned(keys, point, leaves) for point, leaves in zip(points, resolved, strict=True)]
    found = Plan(config, tuple(base), tuple(keys), comparison, tuple(planned))
    _check_distinct(found)
    if comparison:
        _check_fair(found, resolved, vary, patterns)
    return found


def _leaves(config: str, point: Mapping[str, str], base: Sequence[str]) -> dict[str, Any]:
    return configs.flat(configs.load(config, [*base, *overrides(point)]))


def overrides(point: Mapping[str, str]) -> list[str]:
    """The options `--config.key=value` of a point."""
    return [f"{PREFIX}{key}={value}" for key, value in point.items() if key != NAME]


def _planned(keys: Sequence[str], point: Mapping[str, str], leaves: Mapping[str, Any]) -> Planned:
    arm = point.get(NAME) or compare.label(keys, {**point, **leaves})
    seed = leaves.get(compare.SEED)
    parts = [_safe(arm)] if arm else []
    parts += [f"seed={seed}"] if compare.SEED in point or not parts else []
    return Planned(arm, seed, "/".join(parts), {key: value for key, value in point.items() if key != NAME})


def _safe(arm: str) -> str:
    return re.sub(r"[^\w.=,+()-]+", "_", arm)[:120].strip(".") or "arm"


def _check_distinct(found: Plan) -> None:
    seen: dict[str, Planned] = {}
    for run in found.runs:
        if run.folder in seen:
            raise UserError(f'two runs would share the folder {run.folder}; name each point of the list by an "{NAME}"')
        seen[run.folder] = run


def _check_fair(
    found: Plan, resolved: Sequence[Mapping[str, Any]], vary: Sequence[str], patterns: Sequence[str]
) -> None:
    method = [key for key in vary if compare.matches(key, patterns)]
    for key in vary:
        if key not in method:
            values = ", ".join(dict.fromkeys(json.dumps(leaves.get(key)) for leaves in resolved))
            raise UserError(
                f"not a fair comparison: arms that differ in {method[0]} also differ in {key} ({values}); fix it for "
                f"all with {PREFIX}{key}=<value>, sweep it alone as a search, or name it in the config's method_keys"
            )
    seeds = {arm: sorted(str(run.seed) for run in found.runs if run.arm == arm) for arm in found.arms}
    first = found.arms[0]
    for arm, own in seeds.items():
        if own != seeds[first]:
            raise UserError(
                f"not a fair comparison: {arm} has the seeds {', '.join(own)} but {first} has "
                f"{', '.join(seeds[first])}; give every arm the same seeds"
            )


def merge(old: Plan, new: Plan) -> Plan:
    """The runs of both plans, for a sweep that grows by further values or seeds in the same folder.

    Raises UserError where they are not the same sweep, or not fair together.
    """
    for name in ("config", "base", "keys"):
        if getattr(old, name) != getattr(new, name):
            a, b = _told(getattr(old, name)), _told(getattr(new, name))
            raise UserError(f"the folder holds another sweep ({name}: {a} -> {b}); use another --workdir")
    named = {run.folder: run for run in (*old.runs, *new.runs)}
    points = [{**run.overrides, NAME: run.arm} for run in named.values()]
    return plan(new.config, points, new.base)


def _told(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else " ".join(value) or "(none)"


def load(folder: str | os.PathLike) -> Plan | None:
    """The plan recorded in a sweep's folder; None where there is none. Raises UserError for a broken record."""
    file = storage.folder(folder) / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        planned = tuple(Planned(**run) for run in found["runs"])
        return Plan(found["config"], tuple(found["base"]), tuple(found["keys"]), bool(found["comparison"]), planned)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{file}: not a record of a sweep; restore it or use another --workdir") from None


def save(folder: str | os.PathLike, found: Plan, command: Sequence[str]) -> None:
    """Writes the plan and the command that made it to `sweep.json`, whole or not at all."""
    file = storage.folder(folder) / FILE
    record = {
        "command": list(command),
        "config": found.config,
        "base": list(found.base),
        "keys": list(found.keys),
        "comparison": found.comparison,
        "arms": found.arms,
        "seeds": found.seeds,
        "runs": [run._asdict() for run in found.runs],
    }
    storage.write(file, json.dumps(record, indent=2) + "\n")


def pending(folder: str | os.PathLike, found: Plan) -> list[Planned]:
    """The runs that are not finished, in order.

    Raises UserError where a run folder was made with another config than the plan's, showing the difference.
    """
    folder = storage.folder(folder)
    for run in found.runs:
        config = configs.load(found.config, [*found.base, *overrides(run.overrides)])
        lines = configs.mismatch(folder / run.folder, config)
        if lines:
            raise UserError(
                f"{folder / run.folder} was made with another config:\n  "
                + "\n  ".join(lines)
                + "\nuse the same config, or another --workdir for the whole sweep"
            )
    return [run for run in found.runs if not runs.finished(folder / run.folder)]
