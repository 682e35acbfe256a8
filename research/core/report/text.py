"""Numbers as people read them, and the table for a terminal."""

import math
from typing import NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text
from scipy import stats

from research.core import compare
from research.core.report.summary import Arm, Metric, Summary

MISSING = "–"


class Cell(NamedTuple):
    """A value of the table: its text, and whether it is the best of its column or not clear of zero."""

    text: str
    best: bool = False
    faint: bool = False


def value(statistic: compare.Statistic | None, metric: Metric, signed: bool = False) -> str:
    """`97.41 ± 0.22`, in percent for shares; a dash without values, no spread for a single one."""
    if statistic is None:
        return MISSING
    scale = 100 if metric.percent else 1
    places = 2 if metric.percent else _places(statistic)
    text = f"{statistic.mean * scale:{'+' if signed else ''}.{places}f}".replace("-", "−")
    return text if statistic.std is None else f"{text} ± {statistic.std * scale:.{places}f}"


def _places(statistic: compare.Statistic) -> int:
    """Decimals that show three digits of the larger of value and spread, at least one."""
    size = max(abs(statistic.mean), statistic.std or 0)
    return min(6, max(1, 3 - math.ceil(math.log10(size)))) if size else 1


def unit(metric: Metric) -> str:
    """The unit behind the metric's name."""
    return " %" if metric.percent else ""


def interval(statistic: compare.Statistic) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None for a single value."""
    if statistic.std is None:
        return None
    half = float(stats.t.ppf(0.975, statistic.n - 1)) * statistic.std / math.sqrt(statistic.n)
    return statistic.mean - half, statistic.mean + half


def clear(statistic: compare.Statistic) -> bool:
    """Whether the 95 % interval of a gap leaves out zero."""
    found = interval(statistic)
    return found is not None and (found[0] > 0 or found[1] < 0)


def cells(summary: Summary, arm: Arm) -> list[Cell]:
    """The row of an arm: seeds, the primary metric's gap to the baseline, then every metric."""
    metric = summary.primary
    found = [Cell("" if arm.reference else str(len(arm.values(metric.name))) if metric else "0")]
    for m in summary.metrics:
        statistic = compare.statistic(list(arm.values(m.name).values()))
        if statistic and arm.reference and not statistic.std:
            statistic = statistic._replace(std=None)  # one teacher, evaluated by every run
        found.append(Cell(value(statistic, m), best=arm.label in summary.best(m) and not arm.reference))
        if m is metric and summary.baseline is not None:
            gap = summary.gap(arm, m)
            found.append(Cell(value(gap, m, signed=True) if gap else "", faint=gap is not None and not clear(gap)))
    return found


def columns(summary: Summary) -> list[str]:
    """The headings that go with `cells`."""
    found = ["n"]
    for metric in summary.metrics:
        found.append(metric.name.replace("/", " ") + unit(metric) + (" ↓" if metric.lower else ""))
        if metric is summary.primary and summary.baseline is not None:
            found.append(f"over {summary.baseline.label}")
    return found


def headline(summary: Summary) -> str:
    """The result in one sentence, with no more claimed than the seeds carry."""
    metric, base = summary.primary, summary.baseline
    if metric is None:
        return "No run has been evaluated yet."
    found = {arm.label: compare.statistic(list(arm.values(metric.name).values())) for arm in summary.compared}
    found = {label: statistic for label, statistic in found.items() if statistic}
    if not found:
        return "No run is finished yet; the curves show what there is."
    best = summary.best(metric) or list(found)
    name, own = metric.name.replace("/", " "), found[best[0]]
    told = f"{value(own, metric)}{unit(metric)} over {_seeds(own.n)}"
    if len(found) == 1:
        return f"{best[0]}: {name} {told}{'' if base is None else '; no other arm is finished'}."
    if len(best) > 1:
        return f"{' and '.join(best)} share the best mean {name}."
    start = f"{best[0]} has the best mean {name}, {told}"
    if best == [base.label]:
        return f"{start}: no arm improves on the baseline."
    gap = summary.gap(next(arm for arm in summary.compared if arm.label == best[0]), metric)
    if gap is None:
        return f"{start}; the baseline, {base.label}, is not finished."
    points = " points" if metric.percent else ""
    verdict = "" if clear(gap) else f"; {_seeds(gap.n)} cannot tell this gap from zero"
    return f"{start}: {value(gap, metric, signed=True)}{points} over the baseline, {base.label}{verdict}."


def _seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def quantity(number: float | None, unit: str = "") -> str:
    """`4.1 M`, `11.2 k`, `0.27 G`; a dash for None."""
    if number is None:
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def duration(seconds: float | None) -> str:
    """`820 ms`, `12.4 s`, `3 min 5 s`, `2 h 10 min`; a dash for None."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(summary: Summary, width: int) -> Table:
    """The result as a rich table at most `width` wide: the last metrics are left to the page where they do not fit."""
    return fitted(summary.title, columns(summary), [cells(summary, arm) for arm in summary.arms], summary, width)


def fitted(title: str, heads: list[str], rows: list[list[Cell]], summary: Summary, width: int) -> Table:
    """A table with a row for each arm of the summary, of as many of the first columns as fit in `width`."""
    sizes = [max(len(head), *(len(row[i].text) for row in rows)) + 3 for i, head in enumerate(heads)]
    room = width - max(len(arm.label) for arm in summary.arms) - 3
    shown = max(2, sum(sum(sizes[: i + 1]) <= room for i in range(len(sizes))))
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    found.add_column("arm", no_wrap=True)
    for heading in heads[:shown]:
        found.add_column(heading, justify="right", no_wrap=True)
    for arm, row in zip(summary.arms, rows, strict=True):
        texts = [Text(c.text, style="bold" if c.best else "dim" if c.faint else "") for c in row[:shown]]
        found.add_row(arm.label, *texts, style="dim" if arm.reference else "")
    return found
