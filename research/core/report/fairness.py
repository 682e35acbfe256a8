"""What a report says about its comparison, read from the configs and environments of the runs themselves."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from research.core import compare
from research.core import config as configs
from research.core.report.summary import Summary

# What a run's environment says about the moment and the call, not about the machine.
PASSING = ("started", "command*")


class Line(NamedTuple):
    """One sentence; `state` is "good", "bad" (the comparison is not fair), "warn" or "note"."""

    state: str
    text: str


class Fairness(NamedTuple):
    """`kind` is "comparison", "search" or "single"; `lines` say why, in sentences."""

    kind: str
    lines: tuple[Line, ...]

    @property
    def fair(self) -> bool:
        return all(line.state != "bad" for line in self.lines)


def statement(summary: Summary) -> Fairness:
    """Whether the arms differ in the method alone, have the same seeds, and ran on the same machine."""
    if len(summary.compared) < 2:
        return Fairness("single", tuple(_seeds(summary) + _environments(summary)))
    varying = summary.differing()
    method = [key for key in varying if compare.matches(key, summary.patterns)]
    other = [key for key in varying if key not in method]
    if other and not method:
        lines = [
            Line("note", f"A search over {_names(other)}, not a comparison of methods."),
            Line("note", "The best arm is chosen on the data it is evaluated on, so its value is optimistic."),
        ]
        return Fairness("search", tuple(lines + _seeds(summary) + _environments(summary)))
    lines = [Line("bad", f"Not a fair comparison: the arms also differ in {_names(other)}.")] if other else []
    if method:
        lines += [Line("note" if other else "good", f"The arms differ in {_names(method)}{'' if other else ' alone'}.")]
    lines += _same(summary)
    lines += _side_by_side(summary)
    return Fairness("comparison", tuple(lines + _seeds(summary) + _environments(summary)))


def _names(keys: list[str]) -> str:
    return ", ".join(f"{key}" for key in keys)


def _same(summary: Summary) -> list[Line]:
    """Which sections of the config are equal in all arms."""
    leaves = [arm.leaves() for arm in summary.compared]
    keys = [key for key in leaves[0] if key != compare.SEED and not compare.matches(key, compare.HARMLESS)]
    varying = compare.varying(leaves)
    vary = {key.partition(".")[0] for key in varying}
    same = dict.fromkeys(key.partition(".")[0] for key in keys if key not in varying)
    names = [f"the rest of {section}" if section in vary else section for section in same]
    return [Line("good", f"The same in all arms: {', '.join(names)}.")] if names else []


def _side_by_side(summary: Summary) -> list[Line]:
    folders = [{run.folder for run in arm.runs.values()} for arm in summary.compared]
    if len(folders) < 2 or any(own != folders[0] for own in folders):
        return []
    return [Line("good", "The arms of a run are trained side by side on the same batches, in the same order.")]


def _seeds(summary: Summary) -> list[Line]:
    metric = summary.primary
    if metric is None:
        return [Line("warn", "No run has been evaluated.")]
    seeds = {arm.label: list(arm.values(metric.name)) for arm in summary.compared}
    shown = {label: ", ".join(map(str, own)) or "none" for label, own in seeds.items()}
    if len(set(shown.values())) > 1:
        text = "; ".join(f"{label}: {own}" for label, own in shown.items())
        return [Line("bad", f"The arms do not have the same finished seeds ({text}), so gaps are not paired.")]
    own = next(iter(seeds.values()))
    text = f"Finished seeds of every arm: {next(iter(shown.values()))}."
    few = len(own) < 3
    return [Line("warn" if few else "good", text + (" Fewer than three say little about the spread." if few else ""))]


def environments(summary: Summary) -> tuple[dict[str, Any], list[str]]:
    """(what all runs' environments have in common, the names of what differs), as dotted leaves."""
    found = [_machine(run.environment) for run in summary.runs if run.environment]
    if not found:
        return {}, []
    differ = compare.varying(found)
    return {key: value for key, value in found[0].items() if key not in differ}, differ


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: v for key, v in configs.flat(environment).items() if not compare.matches(key, PASSING)}


def _environments(summary: Summary) -> list[Line]:
    _, differ = environments(summary)
    return [Line("warn", f"The runs' environments differ in {', '.join(differ)}.")] if differ else []
