"""What the arms of a report cost, as the rows that terminal and page both show."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich.table import Table

from research.core import compare
from research.core.report import text
from research.core.report.measured import Measured
from research.core.report.summary import Arm, Summary

PARAMETERS, EXTRA = "parameters", "extra parameters"
HEAD = ("MACs", "time a step", "examples/s", "peak memory", "wall time a run")
MEASURED = ("own step", "of it teacher", "of it losses", "memory of losses")


class Costs(NamedTuple):
    """A table: headings, the row of each arm of the summary, and what the columns are."""

    head: list[str]
    rows: list[list[str]]
    note: str


def costs(summary: Summary) -> Costs:
    """The costs of all arms; the columns of what only some methods have stand there where any arm has it."""
    own = [None if arm.reference else summary.measured_of(arm) for arm in summary.arms]
    extra = {arm.label: _extra(arm, measured) for arm, measured in zip(summary.arms, own, strict=True)}
    columns = [_column(PARAMETERS, summary, lambda arm: text.quantity(_count(arm).get("params")), reference=True)]
    if any(number is not None for number in extra.values()):
        columns.append(_column(EXTRA, summary, lambda arm: text.quantity(extra[arm.label])))
    columns.append(_column(HEAD[0], summary, lambda arm: text.quantity(_count(arm).get("macs")), reference=True))
    for name, function in zip(HEAD[1:], (_step, _rate, _memory, _wall), strict=True):
        columns.append(_column(name, summary, function))
    found = [measured for measured in own if measured]
    if found:
        columns += [list(column) for column in zip(MEASURED, *map(_shares, own), strict=True)]
    head, *rows = map(list, zip(*columns, strict=True))
    return Costs(head, rows, _note(summary, found))


def table(summary: Summary, width: int) -> Table:
    """The costs as a rich table at most `width` wide."""
    found = costs(summary)
    return text.fitted("Cost", found.head, [[text.Cell(value) for value in row] for row in found.rows], summary, width)


def _column(name: str, summary: Summary, value: Callable[[Arm], str], reference: bool = False) -> list[str]:
    return [name, *("" if arm.reference and not reference else value(arm) for arm in summary.arms)]


def _count(arm: Arm) -> dict:
    return next(iter(arm.runs.values())).cost_of(arm.inner)


def _extra(arm: Arm, measured: Measured | None) -> int | None:
    return None if arm.reference else _count(arm).get("extra_params", measured.params if measured else None)


def _step(arm: Arm) -> str:
    return text.duration(_mean(run.seconds_per_step() for run in arm.runs.values()))


def _rate(arm: Arm) -> str:
    return text.quantity(_mean(run.examples_per_second() for run in arm.runs.values()))


def _memory(arm: Arm) -> str:
    memory = _mean(run.memory_gb() for run in arm.runs.values())
    return text.MISSING if memory is None else f"{memory:.2f} GB"


def _wall(arm: Arm) -> str:
    return text.duration(_mean(run.seconds() for run in arm.runs.values() if run.finished))


def _shares(own: Measured | None) -> list[str]:
    if own is None:
        return [""] * len(MEASURED)
    whole = own.step + own.teacher
    shares = [f"{100 * part / whole:.2g} %" for part in (own.teacher, own.losses)]
    return [text.duration(whole), *shares, f"{own.bytes / 1e6:.3g} MB"]


def _note(summary: Summary, measured: list[Measured]) -> str:
    note = "MACs: multiply-adds of matrix products and convolutions, one example forward. Time a step: median. "
    note += "Extra parameters: adaptors, trained along and dropped afterwards."
    shared = any(len(run.config.get("students", ())) > 1 for run in summary.runs)
    if shared:
        note += " Times and memory are those of the whole run, which trains its arms side by side"
        note += "." if measured else "; launch.report --measure times each arm's own step."
    if measured:
        where = " and ".join(dict.fromkeys(f"{own.device}, {own.date}" for own in measured))
        note += f" Own step: the teacher's forward and the arm's step, timed on their own ({where}); the losses' share "
        note += "is that of their value and gradient by themselves, their memory is over a step of labels alone."
    return note


def _mean(values: Iterable[float | None]) -> float | None:
    statistic = compare.statistic([value for value in values if value is not None])
    return statistic.mean if statistic else None
