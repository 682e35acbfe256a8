"""The numbers of a report: arms, metrics over seeds, costs, and what differs between the runs.

The value of a metric is that of the last evaluation of a finished run, never the best of several: picking the best
epoch on the evaluation data would flatter whatever is noisy. Unfinished runs are named and left out of the table.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from research.core import compare, runs, storage, sweeps
from research.core import config as configs
from research.core.errors import UserError
from research.core.report import measured

BASELINES = ("none", "no_kd", "nokd", "baseline", "supervised", "ce", "scratch")
ORDER = ("top1", "accuracy", "acc", "miou", "map", "auroc", "top5")
LAST = ("agreement", "loss")


class Metric(NamedTuple):
    """An evaluation metric: whether smaller is better, and whether it is shown as a percentage."""

    name: str
    lower: bool
    percent: bool


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm: its runs by seed, its name inside them ("" where a run is one arm); `reference` for a teacher."""

    label: str
    inner: str
    runs: Mapping[Any, runs.Run]
    reference: bool = False

    def values(self, metric: str) -> dict[Any, float]:
        """Seed -> value of the last evaluation, for the finished runs that have it."""
        last = {seed: run.last(self.inner) for seed, run in self.runs.items() if run.finished}
        return {seed: found[metric] for seed, found in last.items() if metric in found}

    def curves(self, kind: str, metric: str) -> list[list[tuple[int, float]]]:
        """(step, value) of every run that logged the metric, unfinished ones too."""
        found = [run.series.get((kind, self.inner, metric)) for run in self.runs.values()]
        return [points for points in found if points]

    def leaves(self) -> dict[str, Any]:
        """The dotted options of this arm: its run's config, with its own student's options as `student.*`."""
        config = next(iter(self.runs.values())).config
        shared = {key: value for key, value in config.items() if key != "students" or not self._own(config)}
        return configs.flat(shared) | {f"student.{k}": v for k, v in configs.flat(self._own(config)).items()}

    def _own(self, config: Mapping[str, Any]) -> dict[str, Any]:
        students = config.get("students")
        if not isinstance(students, dict):
            return {}
        forms = (own for name, own in students.items() if self.inner.startswith(f"{name}_"))
        return students.get(self.inner) or next(forms, {})


@dataclasses.dataclass(frozen=True)
class Summary:
    """Everything a report shows.

    `notes` are messages about missing and unfinished runs; `timings` are what `measured.read` gives.
    """

    title: str
    runs: tuple[runs.Run, ...]
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    baseline: Arm | None
    notes: tuple[str, ...]
    plan: sweeps.Plan | None
    patterns: tuple[str, ...]
    timings: tuple[tuple[dict[str, Any], measured.Measured], ...] = ()

    @property
    def compared(self) -> list[Arm]:
        """The arms without the references."""
        return [arm for arm in self.arms if not arm.reference]

    @property
    def primary(self) -> Metric | None:
        """The metric that arms are compared by."""
        return self.metrics[0] if self.metrics else None

    def best(self, metric: Metric) -> list[str]:
        """The labels of the arms with the best mean (several where they tie); none with fewer than two arms."""
        found = {arm.label: compare.statistic(list(arm.values(metric.name).values())) for arm in self.compared}
        means = {label: value.mean for label, value in found.items() if value}
        top = (min if metric.lower else max)(means.values(), default=None)
        return [label for label, mean in means.items() if mean == top] if len(means) > 1 else []

    def gap(self, arm: Arm, metric: Metric) -> compare.Statistic | None:
        """How far the arm lies above the baseline; None for the baseline itself and for references."""
        if self.baseline is None or arm is self.baseline or arm.reference:
            return None
        return compare.gap(arm.values(metric.name), self.baseline.values(metric.name))

    def measured_of(self, arm: Arm) -> measured.Measured | None:
        """What a step of the arm takes on its own, where that was measured."""
        return measured.lookup(self.timings, next(iter(arm.runs.values())).config, arm.inner)

    def differing(self) -> list[str]:
        """The options that differ between the arms, without the seed."""
        return compare.varying([arm.leaves() for arm in self.compared])


def collect(paths: Sequence[str | os.PathLike], baseline: str | None = None, metric: str | None = None) -> Summary:
    """Reads the runs of `paths`, each a run folder, a sweep or a folder of runs.

    Args:
      baseline: label of the arm that others are compared to; by default one named like `none`, else the first.
      metric: evaluation metric to compare by; by default top1 or what comes nearest.
    Raises:
      FileNotFoundError, UserError: no such folder, no runs in it, no such arm or metric.
    """
    plans = {path: plan for path in map(storage.folder, paths) if (plan := sweeps.load(path))}
    folders: list[storage.Path] = []
    notes: list[str] = []
    for path in map(storage.folder, paths):
        if path in plans:
            planned = [path / run.folder for run in plans[path].runs]
            present = [folder for folder in planned if (folder / runs.CONFIG).is_file()]
            folders += present
            notes += [f"{_under(folder, paths)} has not started" for folder in planned if folder not in present]
        else:
            folders += runs.find([path])
    found = [runs.read(folder) for folder in dict.fromkeys(folders)]
    if not found:
        raise UserError(f"{paths[0]}: none of the sweep's runs has started")
    for run in found:
        name = _under(run.folder, paths)
        if not run.finished:
            notes.append(f"{name} is not finished (step {run.step:,}) and is left out of the table")
        notes += [f"{name}: {problem}" for problem in run.problems]
    plan = next(iter(plans.values())) if len(plans) == 1 and len(paths) == 1 else None
    arms = _arms(found, plan)
    first = _baseline(arms, baseline)
    arms.sort(key=lambda arm: (arm.reference, arm is not first))
    metrics = _metrics(arms, metric)
    title = " + ".join(path.resolve().name for path in map(storage.folder, paths))
    patterns = compare.method_keys(found[0].config)
    timed = tuple(measured.read(map(storage.folder, paths)))
    return Summary(title, tuple(found), tuple(arms), tuple(metrics), first, tuple(notes), plan, patterns, timed)


def _under(folder: storage.Path, paths: Sequence[str | os.PathLike]) -> str:
    """The folder's name below the one that was asked for."""
    for path in map(storage.folder, paths):
        if folder != path and folder.is_relative_to(path):
            return str(folder.relative_to(path))
    return folder.name


def _arms(found: Sequence[runs.Run], plan: sweeps.Plan | None) -> list[Arm]:
    leaves = [configs.flat(run.config) for run in found]
    trained = [set(run.config.get("students", ())) for run in found]
    # A student that only some runs have is an arm by its own name; its options name no run.
    partial = set.union(*trained) - set.intersection(*trained)
    varying = [k for k in compare.varying(leaves) if not (k.startswith("students.") and k.split(".")[1] in partial)]
    keys = list(plan.keys) if plan else varying
    named = {run.folder: run.arm for run in plan.runs} if plan else {}
    inner = list(dict.fromkeys(arm for run in found for arm in run.arms))
    references = {runs.TEACHER}.difference(*trained)
    several = len([arm for arm in inner if arm not in references]) > 1
    members: dict[tuple[str, str], dict[Any, runs.Run]] = {}
    for run, own in zip(found, leaves, strict=True):
        outer = next((arm for folder, arm in named.items() if run.folder.match(folder)), None)
        if outer is None:
            outer = compare.label(keys, own) if own else run.folder.name
        for arm in run.arms:
            # A teacher evaluated by every run is one reference, not one for each arm.
            group = members.setdefault(("" if arm in references else outer, arm), {})
            seed = run.seed if run.seed is not None else len(group)
            while seed in group:
                seed = f"{seed} again"
            group[seed] = run
    # Where one option varies its values name the arms.
    prefix = f"{compare.shorten(keys)[0]}=" if len(keys) == 1 else ""
    bare = prefix and all(outer.startswith(prefix) for outer, _ in members if outer)

    def name(outer: str, arm: str) -> str:
        outer = outer.removeprefix(prefix) if bare else outer.replace(",", ", ")
        return ", ".join(filter(None, [outer, arm if several or not outer or arm in references else ""])) or "run"

    return [Arm(name(*key), key[1], group, key[1] in references) for key, group in members.items()]


def _metrics(arms: Sequence[Arm], wanted: str | None) -> list[Metric]:
    names: dict[str, list[float]] = {}
    for arm in arms:
        for kind, inner, metric in {key: None for run in arm.runs.values() for key in run.series}:
            if kind == "eval" and inner == arm.inner:
                names.setdefault(metric, []).extend(v for points in arm.curves(kind, metric) for _, v in points)
    if wanted and wanted not in names:
        raise UserError(f"--metric {wanted}: not among the evaluated {', '.join(names) or '(nothing)'}")

    def rank(name: str) -> tuple:
        last = name.rpartition("/")[2]
        place = ORDER.index(last) if last in ORDER else len(ORDER) + (1 + LAST.index(last) if last in LAST else 0)
        return (name != wanted, "/" in name, place, name)

    return [Metric(n, compare.lower_is_better(n), compare.is_fraction(n, names[n])) for n in sorted(names, key=rank)]


def _baseline(arms: Sequence[Arm], wanted: str | None) -> Arm | None:
    compared = [arm for arm in arms if not arm.reference]
    if wanted:
        for arm in compared:
            if arm.label == wanted:
                return arm
        raise UserError(f"--baseline {wanted}: not among the arms {', '.join(arm.label for arm in compared)}")
    if len(compared) < 2:
        return None

    def usual(arm: Arm) -> bool:
        return any(part.rpartition("=")[2].lower() in BASELINES for part in arm.label.split(", "))

    return next(filter(usual, compared), compared[0])
