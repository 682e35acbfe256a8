"""A picture of the result for a page of text: dots by run, mean and standard deviation by arm."""

import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.core import compare
from research.core.errors import UserError
from research.core.report import text
from research.core.report.style import LIGHT
from research.core.report.summary import Summary

INK, SOFT, HAIR = "#22252a", "#6a6f76", "#e4e1da"


def save(summary: Summary, file: pathlib.Path) -> None:
    """Writes the picture of the primary metric as PNG. Raises UserError where no run is finished."""
    metric = summary.primary
    arms = [arm for arm in summary.compared if metric and arm.values(metric.name)]
    if not arms:
        raise UserError(f"{file}: no picture, as no run is finished")
    scale = 100 if metric.percent else 1
    figure = Figure(figsize=(8, 1.15 + 0.5 * len(arms)), dpi=180, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    hues = iter(LIGHT * len(arms))
    for place, arm in enumerate(arms):
        colour = SOFT if arm is summary.baseline else next(hues)
        values = [scale * value for value in arm.values(metric.name).values()]
        mean, std, _ = compare.statistic(values)
        if std:
            axes.plot([mean - std, mean + std], [place, place], color=colour, lw=6, alpha=0.25, solid_capstyle="round")
        axes.plot([mean, mean], [place - 0.24, place + 0.24], color=colour, lw=2)
        axes.scatter(values, [place] * len(values), s=34, color=colour, edgecolor="white", lw=0.9, zorder=3)
        told = text.value(compare.statistic(list(arm.values(metric.name).values())), metric)
        axes.annotate(told, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=10, color=INK)
        if arm is summary.baseline:
            axes.axvline(mean, color=SOFT, lw=0.8, ls=(0, (3, 4)), zorder=0)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms], fontsize=11, color=INK)
    axes.set_ylim(len(arms) - 0.45, -0.55)
    axes.margins(x=0.06)
    name = metric.name.replace("/", " ")
    seeds = max(len(arm.values(metric.name)) for arm in arms)
    told = f"{name}{' (%)' if metric.percent else ''}, {seeds} seed{'s' * (seeds > 1)}"
    axes.set_xlabel(told, color=SOFT, fontsize=10)
    axes.tick_params(axis="x", colors=SOFT, labelsize=9, length=0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=HAIR, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
