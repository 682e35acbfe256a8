"""What may vary between the arms of a comparison, and the numbers that describe it.

A comparison of methods is fair when its arms differ in the method alone: data, augmentation, batch size, optimiser,
schedule, length, model, initial weights and seeds are the same. The keys of the method are given by the config's
`method_keys`, patterns in which `*` stands for anything.
"""

import fnmatch
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

METHOD_KEYS = ("students.*.loss*", "students.*.hint*", "students.*.group", "student.loss*", "loss*", "distill.*")
# Options that do not touch the result.
HARMLESS = ("log.*", "save.*", "*workers", "teacher.workdir", "method_keys*")
SEED = "seed"
LOWER_IS_BETTER = ("loss", "error", "nll", "ece", "perplexity", "mae", "mse", "rmse", "fid", "seconds")
FRACTIONS = ("top", "acc", "recall", "precision", "auroc", "auc", "map", "miou", "iou", "f1", "agreement")


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted key is one of `patterns`."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def method_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The patterns of the keys that make up the method: the config's own, else the usual ones."""
    return tuple(config["method_keys"]) if "method_keys" in config else METHOD_KEYS


def varying(leaves: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ between configs given as dotted leaves; without the seed and what is harmless."""
    names = dict.fromkeys(name for found in leaves for name in found)
    missing = object()
    first = leaves[0] if leaves else {}
    groups = {name.rpartition(".")[0] for name in names}  # an empty group is no value of its own beside a filled one
    differ = [n for n in names if any(found.get(n, missing) != first.get(n, missing) for found in leaves)]
    return [name for name in differ if name != SEED and name not in groups and not matches(name, HARMLESS)]


def label(keys: Sequence[str], leaves: Mapping[str, Any]) -> str:
    """The name of an arm by its values of `keys`: `loss=kd`, or `loss=kd,lr=0.1`; "" without keys."""
    return ",".join(f"{short}={_show(leaves.get(key))}" for key, short in zip(keys, shorten(keys), strict=True))


def shorten(keys: Sequence[str]) -> list[str]:
    """The last parts of dotted keys, as many as tell them apart."""

    def tail(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    def shortest(key: str) -> str:
        sizes = range(1, key.count(".") + 2)
        unique = [tail(key, n) for n in sizes if sum(tail(other, n) == tail(key, n) for other in keys) == 1]
        return unique[0] if unique else key

    return [shortest(key) for key in keys]


def _show(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "(" + ",".join(map(_show, value)) + ")"
    return str(value) if value != "" else "none"


class Statistic(NamedTuple):
    """Mean and sample standard deviation (ddof 1; None for one value) of `n` values."""

    mean: float
    std: float | None
    n: int


def statistic(values: Sequence[float]) -> Statistic | None:
    """Mean, sample standard deviation and number of `values`; None for no values."""
    if not values:
        return None
    return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def gap(values: Mapping[Any, float], baseline: Mapping[Any, float]) -> Statistic | None:
    """How far `values` lie above `baseline`, both by seed, with the sign as it is.

    Where both have the same seeds the differences are taken seed by seed, so what a seed does to both cancels.
    Otherwise it is the difference of the means, with the spread of a difference of two independent values.
    """
    if not values or not baseline:
        return None
    if set(values) == set(baseline):
        return statistic([values[seed] - baseline[seed] for seed in values])
    a, b = statistic(list(values.values())), statistic(list(baseline.values()))
    std = math.hypot(a.std, b.std) if a.std is not None and b.std is not None else None
    return Statistic(a.mean - b.mean, std, min(a.n, b.n))


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of the metric is the better one, by its name."""
    last = metric.rpartition("/")[2].lower()
    return any(word in LOWER_IS_BETTER for word in last.replace("-", "_").split("_"))


def is_fraction(metric: str, values: Iterable[float]) -> bool:
    """Whether the metric is a share between 0 and 1 that people read as a percentage."""
    last = metric.rpartition("/")[2].lower()
    return last.startswith(FRACTIONS) and not lower_is_better(metric) and all(0 <= value <= 1 for value in values)
