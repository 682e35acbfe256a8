"""Charts as SVG text for a page that needs no other file: lines over steps with bands, and dots by arm.

Colours are classes `s0`, `s1`, … that the page's style sheet fills, so one chart serves light and dark.
"""

import html
import json
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

HALF, WHOLE = (460, 270), (950, 330)  # width and height of a chart that shares its row, and of one that does not
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 24
POINTS = 240
# Steep beginnings would leave no room for what tells the arms apart: the frame is fitted to the rest.
SETTLED = 0.2


class Band(NamedTuple):
    """Mean and sample standard deviation over runs at each step; `style` is the arm's class."""

    label: str
    style: str
    steps: list[float]
    means: list[float]
    stds: list[float]


class Row(NamedTuple):
    """One arm of a dot chart: its values by run."""

    label: str
    style: str
    values: list[float]


def band(label: str, style: str, curves: Sequence[Sequence[tuple[int, float]]]) -> Band:
    """The mean curve of several runs over the steps that any of them logged, in at most POINTS bins of steps."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    size = max(1, math.ceil(len(steps) / POINTS))
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    means = [statistics.fmean(statistics.fmean(by_step[s]) for s in group) for group in groups]
    # The spread between runs, averaged over the bin: not that between steps.
    stds = [statistics.fmean(statistics.stdev(v) if len(v := by_step[s]) > 1 else 0 for s in group) for group in groups]
    return Band(label, style, [statistics.fmean(group) for group in groups], means, stds)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that lie within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short text of an axis value: 12k, 0.25, −3."""
    if abs(value) >= 10_000:
        text = f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    else:
        text = f"{value:.6g}"
    return text.replace("-", "−")


def lines(bands: Sequence[Band], title: str, percent: bool = False, size: tuple[int, int] = HALF) -> str:
    """A line chart over steps, with a band of one standard deviation around each line.

    The frame is fitted to the values after the first fifth of the steps; what lies outside it is cut off.
    """
    scale = 100 if percent else 1
    bands = [b._replace(means=[scale * m for m in b.means], stds=[scale * s for s in b.stds]) for b in bands]
    first, last = min(b.steps[0] for b in bands), max(b.steps[-1] for b in bands)
    span = (last - first) or 1
    low, high = _range(bands, first + SETTLED * span)
    width, height = size
    inner = (width - LEFT - RIGHT, height - TOP - BOTTOM)

    def x(step: float) -> float:
        return LEFT + inner[0] * (step - first) / span

    def y(value: float) -> float:
        return TOP + inner[1] * (1 - (value - low) / (high - low))

    grid = [
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f"{_text(LEFT - 8, y(v) + 4, number(v), 'end')}"
        for v in ticks(low, high)
    ]
    steps = [
        v for v in ticks(first, last, width // 110) if v == round(v) and x(v) > LEFT + 24
    ]  # the word stands before them
    grid += [_text(x(v), height - BOTTOM + 17, number(v), "middle") for v in steps]
    grid.append(_text(LEFT - 8, height - BOTTOM + 17, "step", "end"))
    parts = []
    for b in bands:
        if any(b.stds):
            upper = [(x(s), y(m + d)) for s, m, d in zip(b.steps, b.means, b.stds, strict=True)]
            lower = [(x(s), y(m - d)) for s, m, d in zip(b.steps, b.means, b.stds, strict=True)]
            parts.append(f'<polygon class="band {b.style}" points="{_points(upper + lower[::-1])}"/>')
    for b in bands:
        points = [(x(s), y(m)) for s, m in zip(b.steps, b.means, strict=True)]
        parts.append(f'<polyline class="line {b.style}" points="{_points(points)}"/>')
        if len(points) <= 30:
            parts += [f'<circle class="mark {b.style}" cx="{a:.1f}" cy="{c:.1f}" r="2"/>' for a, c in points]
    # A nested svg cuts off what leaves the frame; the margin keeps marks on its edge whole.
    box = (LEFT - 3, TOP - 3, inner[0] + 6, inner[1] + 6)
    place = f'x="{box[0]}" y="{box[1]}" width="{box[2]}" height="{box[3]}"'
    view = " ".join(map(str, box))
    grid.append(f'<svg class="plot" {place} viewBox="{view}">{"".join(parts)}</svg>')
    grid.append(f'<line class="rule" y1="{TOP}" y2="{height - BOTTOM}" x1="0" x2="0"/>')
    data = {
        "x": [LEFT, width - RIGHT, first, last],
        "unit": " %" if percent else "",
        "lines": [
            {"label": b.label, "style": b.style, "steps": [round(s) for s in b.steps], "means": _short(b.means)}
            for b in bands
        ],
    }
    ends = "; ".join(f"{b.label} ends at {b.means[-1]:.4g}{' %' if percent else ''}" for b in bands)
    return _svg(*size, title, ends, grid, f' data-chart="{html.escape(json.dumps(data), quote=True)}"')


def _range(bands: Sequence[Band], settled: float) -> tuple[float, float]:
    """The values to show: those of the bands from step `settled` on, with a margin."""
    shown = [
        edge
        for b in bands
        for step, mean, std in zip(b.steps, b.means, b.stds, strict=True)
        if step >= settled or step == b.steps[-1]
        for edge in (mean - std, mean + std)
    ]
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def dots(rows: Sequence[Row], title: str, baseline: float | None, percent: bool = False) -> str:
    """A chart with a line for each arm: a dot for each run, a bar of mean ± standard deviation."""
    scale = 100 if percent else 1
    rows = [row._replace(values=[scale * v for v in row.values]) for row in rows]
    left = 24 + 7.4 * max(len(row.label) for row in rows)
    width, pitch, top, bottom = WHOLE[0], 38, 8, 30
    height = top + pitch * len(rows) + bottom
    spread = [statistics.stdev(row.values) if len(row.values) > 1 else 0.0 for row in rows]
    means = [statistics.fmean(row.values) for row in rows]
    low = min([min(r.values) for r in rows] + [m - s for m, s in zip(means, spread, strict=True)])
    high = max([max(r.values) for r in rows] + [m + s for m, s in zip(means, spread, strict=True)])
    margin = 0.06 * (high - low) or abs(high) * 0.01 or 1.0
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return left + (width - left - 24) * (value - low) / (high - low)

    floor = top + pitch * len(rows)
    parts = []
    for value in ticks(low, high, 8):
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{top}" y2="{floor}"/>')
        parts.append(_text(x(value), floor + 18, number(value) + ("%" if percent else ""), "middle"))
    if baseline is not None:
        at = x(scale * baseline)
        parts.append(f'<line class="base" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{floor}"/>')
    for i, (row, mean, std) in enumerate(zip(rows, means, spread, strict=True)):
        middle = top + pitch * (i + 0.5)
        parts.append(_text(left - 14, middle + 4.5, row.label, "end", "name"))
        start, end = x(mean - std), x(mean + std)
        parts.append(f'<line class="bar {row.style}" x1="{start:.1f}" x2="{end:.1f}" y1="{middle}" y2="{middle}"/>')
        parts.append(
            f'<line class="mean {row.style}" x1="{x(mean):.1f}" x2="{x(mean):.1f}" y1="{middle - 9}" '
            f'y2="{middle + 9}"/>'
        )
        for value in row.values:
            tip = f"<title>{html.escape(row.label)} {value:.4g}</title>"
            parts.append(f'<circle class="dot {row.style}" cx="{x(value):.1f}" cy="{middle}" r="4.5">{tip}</circle>')
    told = "; ".join(f"{row.label}: mean {mean:.4g}" for row, mean in zip(rows, means, strict=True))
    return _svg(width, height, title, told, parts)


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.5g}") for v in values]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    name = f' class="{style}"' if style else ""
    return f'<text{name} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, title: str, told: str, parts: Sequence[str], extra: str = "") -> str:
    label = html.escape(f"{title}. {told}.", quote=True)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}"{extra}>{"".join(parts)}</svg>'
