"""A report as one HTML file: no network, light and dark, readable without colour or script."""

import html
import json
import shlex
import time
from collections.abc import Iterable, Sequence
from typing import Any

from research.core import compare
from research.core import config as configs
from research.core.report import costs, fairness, svg, text
from research.core.report.style import CSS, SCRIPT, STYLES
from research.core.report.summary import Arm, Metric, Summary

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
CURVES = "Mean over seeds; the band is one standard deviation. Frames fit all but the first fifth of the steps."
_ABSENT = object()


def page(summary: Summary) -> str:
    """The whole page."""
    said = fairness.statement(summary)
    sections = [
        _head(summary),
        _result(summary),
        _curves(summary),
        _fairness(said),
        _cost(summary),
        _options(summary),
        _environment(summary),
        _runs(summary),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_e(summary.title)} – report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{CSS}</style></head>'
        f'<body><main>{"".join(sections)}</main><div id="tip" role="status" hidden></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def style(summary: Summary, arm: Arm) -> str:
    """The class that colours an arm: grey for the baseline and for references, a hue for each other arm."""
    if arm.reference:
        return "sr"
    if arm is summary.baseline:
        return "sb"
    others = [a for a in summary.compared if a is not summary.baseline]
    return f"s{others.index(arm) % STYLES}"


def _e(value: Any) -> str:
    return html.escape(str(value))


def _swatch(summary: Summary, arm: Arm) -> str:
    return f'<span class="swatch {style(summary, arm)}" aria-hidden="true"></span>'


def _table(head: Sequence[str], rows: Iterable[str], caption: str, words: bool = False) -> str:
    cells = "".join(f'<th scope="col">{_e(name)}</th>' for name in head)
    kind = _class("words" if words else "")
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_e(caption)}"><table{kind}>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(head: str, cells: Iterable[tuple[str, str]], kind: str = "") -> str:
    found = "".join(f"<td{_class(name)}>{_e(value)}</td>" for name, value in cells)
    return f'<tr{_class(kind)}><th scope="row">{head}</th>{found}</tr>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _head(summary: Summary) -> str:
    done = sum(run.finished for run in summary.runs)
    facts = [f"{done} of {len(summary.runs)} runs finished", f"{len(summary.compared)} arms"]
    last = max((run.rows[-1]["time"] for run in summary.runs if run.rows), default=None)
    if last:
        facts.append(time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(last)))
    notes = "".join(f"<li>{_e(note)}</li>" for note in summary.notes)
    aside = f'<aside role="note"><b>Incomplete</b><ul>{notes}</ul></aside>' if notes else ""
    return (
        f'<header><h1>{_e(summary.title)}</h1><p class="lead">{_e(_together(text.headline(summary)))}</p>'
        f'<p class="facts">{_e(" · ".join(facts))}</p>{aside}</header>'
    )


def _together(sentence: str) -> str:
    """The sentence with no line break inside `96.35 ± 0.32 %`."""
    return sentence.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def _result(summary: Summary) -> str:
    metric = summary.primary
    if metric is None or not any(arm.values(metric.name) for arm in summary.compared):
        return ""
    rows = []
    for arm in summary.arms:
        found = [("best" if c.best else "faint" if c.faint else "", c.text) for c in text.cells(summary, arm)]
        rows.append(_row(_swatch(summary, arm) + _e(arm.label), found, "reference" if arm.reference else ""))
    notes = ["Mean ± sample standard deviation over n seeds, from the last evaluation of each finished run."]
    if any(cell.best for arm in summary.arms for cell in text.cells(summary, arm)):
        notes.append("Bold: best mean.")
    if summary.baseline is not None:
        notes.append(
            f"Gaps to {summary.baseline.label} are taken seed by seed where the seeds are the same; "
            "in grey where the 95 % interval (Student's t) includes zero."
        )
    return (
        f"<section><h2>Result</h2>{_dots(summary, metric)}{_table(['', *text.columns(summary)], rows, 'Result')}"
        f'<p class="quiet">{_e(" ".join(notes))}</p></section>'
    )


def _dots(summary: Summary, metric: Metric) -> str:
    rows = [
        svg.Row(arm.label, style(summary, arm), list(values.values()))
        for arm in summary.compared
        if (values := arm.values(metric.name))
    ]
    base = compare.statistic(list(summary.baseline.values(metric.name).values())) if summary.baseline else None
    chart = svg.dots(rows, f"{metric.name} by arm", base.mean if base else None, metric.percent)
    words = "each dot a run, the tick their mean, the bar one standard deviation"
    words += f", the dashed line the mean of {summary.baseline.label}" if base else ""
    caption = f"<b>{_e(metric.name)}{text.unit(metric)}</b>: {_e(words)}"
    return f'<figure class="plain"><figcaption>{caption}</figcaption>{chart}</figure>'


def _curves(summary: Summary) -> str:
    wanted: list[tuple[str, str, bool, str]] = []
    for metric in summary.metrics:
        if metric is summary.primary or metric.name == "loss":
            wanted.append(("eval", metric.name, metric.percent, f"{metric.name}, evaluation"))
    wanted.append(("train", "loss", False, "loss, training"))
    figures = []
    for kind, name, percent, title in wanted:
        bands = [
            svg.band(arm.label, style(summary, arm), curves)
            for arm in summary.compared
            if (curves := arm.curves(kind, name))
        ]
        if bands and any(len(band.steps) > 1 for band in bands):
            own = kind == "train" and len(bands) > 1
            note = ": each arm's own objective" if own else ""
            caption = f"<figcaption><b>{_e(title)}{' %' if percent else ''}</b>{_e(note)}</figcaption>"
            size = svg.HALF if figures else svg.WHOLE
            chart = svg.lines(bands, title, percent, size)
            figures.append(f"<figure{_class('' if figures else 'whole')}>{caption}{chart}</figure>")
    if not figures:
        return ""
    items = "".join(f"<li>{_swatch(summary, arm)}{_e(arm.label)}</li>" for arm in summary.compared)
    return (
        f'<section><h2>Curves</h2><p class="quiet">{_e(CURVES)}</p>'
        f'<ul class="legend">{items}</ul><div class="charts">{"".join(figures)}</div></section>'
    )


def _fairness(said: fairness.Fairness) -> str:
    if said.kind == "search":
        title = "A search, not a comparison"
    elif said.kind == "single":
        title = "What it rests on"
    else:
        title = "A fair comparison" if said.fair else "Not a fair comparison"
    items = "".join(f'<li class="{line.state}">{_e(line.text)}</li>' for line in said.lines)
    return f'<section><h2>{title}</h2><ul class="says">{items}</ul></section>' if items else ""


def _cost(summary: Summary) -> str:
    found = costs.costs(summary)
    rows = [
        _row(
            _swatch(summary, arm) + _e(arm.label),
            [("", value) for value in values],
            "reference" if arm.reference else "",
        )
        for arm, values in zip(summary.arms, found.rows, strict=True)
    ]
    table = _table(["", *found.head], rows, "Cost")
    return f'<section><h2>Cost</h2>{table}<p class="quiet">{_e(found.note)}</p></section>'


def _options(summary: Summary) -> str:
    keys = summary.differing() if len(summary.compared) > 1 else []
    leaves = {arm.label: arm.leaves() for arm in summary.compared}
    rows = []
    for key in keys:
        values = [("", _show(own.get(key, _ABSENT))) for own in leaves.values()]
        rows.append(_row(f"<code>{_e(key)}</code>", values))
    parts = [_table(["option", *leaves], rows, "Options that differ", words=True)] if rows else []
    first = summary.runs[0]
    if first.config:
        config = json.dumps(first.config, indent=2, sort_keys=True)
        of = _e(first.folder.name)
        parts.append(f"<details><summary>The config of {of}</summary><pre>{_e(config)}</pre></details>")
    title = "What differs" if rows else "Config"
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if parts else ""


def _show(value: Any) -> str:
    if value is _ABSENT:
        return text.MISSING
    return "none" if value in ("", None) else value if isinstance(value, str) else json.dumps(value)


def _environment(summary: Summary) -> str:
    common, differ = fairness.environments(summary)
    if not common and not differ:
        return ""
    told = {key: _brief(key, value) for key, value in common.items()}
    for key in differ:
        values = {_brief(key, configs.flat(run.environment).get(key, _ABSENT)): None for run in summary.runs}
        told[key] = " or ".join(values)
    items = "".join(f"<div><dt>{_e(k.removeprefix('packages.'))}</dt><dd>{_e(v)}</dd></div>" for k, v in told.items())
    return f"<section><h2>Environment</h2><dl>{items}</dl></section>"


def _brief(key: str, value: Any) -> str:
    shown = _show(value)
    return shown[:10] + "+" * shown.endswith("+") if key == "commit" else shown


def _runs(summary: Summary) -> str:
    rows = []
    for run in summary.runs:
        state = "finished" if run.finished else "not finished"
        found = [_show(run.seed), state, f"{run.step:,}", text.duration(run.seconds())]
        command = run.environment.get("command", "")
        words = shlex.join(command) if isinstance(command, list) else str(command)
        name = _e("/".join(run.folder.parts[-2:]))
        more = f"<details><summary>command</summary><code>{_e(words)}</code></details>" if words else ""
        rows.append(_row(name + more, [("", value) for value in found]))
    return f"<section><h2>Runs</h2>{_table(['', 'seed', 'state', 'steps', 'wall time'], rows, 'Runs')}</section>"
