"""Finds settings of a config's `parallel` section (and rematerialisation) under which its step fits a device's memory.

What a setting does to the state is known exactly from its shardings; what it does to activations is predicted from the
last program that was compiled, and then compiled to be sure.
"""

import json
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from research.core import sharding
from research.core.config import PREFIX
from research.core.errors import deliberate
from research.core.experiment import State
from research.pods.measure import TEMPORARIES, Measured, device_bytes

REPLICATED = ((".*", "replicate"),)
FSDP = ((".*", "fsdp"),)
MARGIN = 0.95  # of the memory, that a prediction may use
KEPT = 0.35  # of the activations, under rematerialisation of every block: a guess that a compilation corrects


class Setting(NamedTuple):
    """One way to save memory: size of the fsdp axis, micro-batches, whether students recompute their activations."""

    fsdp: int
    accumulate: int
    remat: bool

    @property
    def slowdown(self) -> float:
        """Rough cost, to order settings: recomputation a third, micro-batches and gathers little."""
        return 0.33 * self.remat + 0.03 * math.log2(self.accumulate) + 0.02 * math.log2(self.fsdp)


def current(config: ConfigDict, devices: int) -> Setting:
    """The setting that a config has."""
    axes = dict(config.parallel.axes)
    fsdp = axes.get("fsdp", 1)
    if fsdp == -1:
        fsdp = devices // max(axes.get("data", 1) * axes.get("tensor", 1), 1)
    return Setting(fsdp, config.parallel.accumulate, not _rematerialisable(config))


def settings(config: ConfigDict, devices: int) -> list[Setting]:
    """Those that save more than the present one, the least costly first."""
    now = current(config, devices)
    fixed = config.parallel.axes.get("tensor", 1)
    data_like = devices // fixed
    fsdp = [n for n in _doublings(now.fsdp, data_like) if data_like % n == 0]
    accumulate = [n for n in _doublings(now.accumulate, config.batch_size) if config.batch_size % (n * data_like) == 0]
    remat = sorted({now.remat, now.remat or bool(_rematerialisable(config))})
    found = [Setting(f, a, r) for f in fsdp for a in accumulate or [now.accumulate] for r in remat]
    return sorted((s for s in found if s != now), key=lambda s: (s.slowdown, s))


def overrides(config: ConfigDict, setting: Setting, devices: int) -> list[str]:
    """The texts `--config.key=value` that turn the config into a setting."""
    now, texts = current(config, devices), []
    if setting.fsdp != now.fsdp:
        texts += [f"{PREFIX}parallel.axes.data=-1", f"{PREFIX}parallel.axes.fsdp={setting.fsdp}"]
        if tuple(config.parallel.rules) == REPLICATED:
            texts.append(PREFIX + "parallel.rules=" + json.dumps(FSDP, separators=(",", ":")))
    if setting.accumulate != now.accumulate:
        texts.append(f"{PREFIX}parallel.accumulate={setting.accumulate}")
    if setting.remat and not now.remat:
        texts += [f"{PREFIX}{path}=true" for path in _rematerialisable(config)]
    return texts


def state_bytes(shapes: State, config: ConfigDict, setting: Setting, devices: Sequence) -> tuple[int, int]:
    """Exact bytes on one device under a setting, of the state and of its parameters alone; nothing is compiled."""
    axes = dict(config.parallel.axes) | {"data": -1, "fsdp": setting.fsdp}
    rules = tuple(config.parallel.rules)
    mesh = sharding.mesh(axes, devices)
    placed = sharding.shardings(shapes, mesh, FSDP if setting.fsdp > 1 and rules == REPLICATED else rules)
    state = sharding.placed_shapes(shapes, placed)
    return device_bytes(state), device_bytes(state.params)


def predicted(setting: Setting, tried: Setting, temporaries: int, sizes: dict[Setting, tuple[int, int]]) -> float:
    """Bytes a setting should need, from the temporaries of the program that was `tried`.

    Gradients are as large as the parameters, and there twice with micro-batches; the rest are activations.
    """
    gradients = {s: sizes[s][1] * (2 if s.accumulate > 1 else 1) for s in (tried, setting)}
    activations = max(temporaries - gradients[tried], 0) * tried.accumulate / setting.accumulate
    recomputed = KEPT if setting.remat and not tried.remat else 1.0
    return sizes[setting][0] + gradients[setting] + activations * recomputed


def suggestions(
    config: ConfigDict, shapes: State, failed: Measured, devices: Sequence, most: int = 4
) -> list[tuple[Setting, float]]:
    """(setting, predicted bytes) of those that should fit, the least costly first; the nearest where none should."""
    now = current(config, len(devices))
    sizes = _sizes(shapes, config, now, devices)
    possible = [s for s in sizes if s != now and sizes[s][0] <= failed.limit]
    needs = {s: predicted(s, now, _temporaries(failed), sizes) for s in possible}
    fitting = [s for s in possible if needs[s] <= MARGIN * failed.limit]
    return [(s, needs[s]) for s in (fitting or sorted(possible, key=needs.get))[:most]]


def _sizes(shapes: State, config: ConfigDict, now: Setting, devices: Sequence) -> dict[Setting, tuple[int, int]]:
    """`state_bytes` of the present setting and of all others, the least costly first."""
    return {s: state_bytes(shapes, config, s, devices) for s in (now, *settings(config, len(devices)))}


def search(
    config: ConfigDict,
    shapes: State,
    failed: Measured,
    devices: Sequence,
    attempt: Callable[[list[str]], Measured],
    say: Callable[[str], None] = lambda line: None,
    most: int = 8,
) -> tuple[list[str], Measured] | None:
    """The least costly setting that fits, as (overrides, its measured step); None where none of `most` tries does.

    Args:
      config: the resolved config that does not fit.
      shapes: its state.
      failed: its measured step.
      devices: of the topology.
      attempt: compiles the config with overrides; a deliberate error says that the setting is not possible.
      say: takes lines of progress.
      most: settings compiled at most.
    """
    now = current(config, len(devices))
    sizes = _sizes(shapes, config, now, devices)
    possible = [s for s in sizes if s != now and sizes[s][0] <= failed.limit]
    if skipped := len(sizes) - 1 - len(possible):
        say(f"{skipped} settings skipped: their state alone exceeds {failed.limit / 2**30:.2f} GiB")
    tried, temporaries = now, _temporaries(failed)
    for _ in range(most):
        if not possible:
            return None
        setting = _next(possible, tried, temporaries, sizes, failed.limit)
        possible.remove(setting)
        texts = overrides(config, setting, len(devices))
        say(f"trying {shlex.join(texts)}")
        try:
            found = attempt(texts)
        except Exception as error:
            if not deliberate(error):
                raise
            say(f"  not possible: {error}")
            continue
        say(f"  {'fits' if found.fits else 'does not fit'}: {found.peak / 2**30:.2f} GiB")
        if found.fits:
            return texts, found
        tried, temporaries = setting, _temporaries(found)
    return None


def _next(possible: Iterable[Setting], tried: Setting, temporaries: int, sizes: dict, limit: int) -> Setting:
    """The least costly setting that should fit, else the one that should need least."""
    needs = {s: predicted(s, tried, temporaries, sizes) for s in possible}
    fitting = [s for s in needs if needs[s] <= MARGIN * limit]
    return fitting[0] if fitting else min(needs, key=needs.get)


def _temporaries(measured: Measured) -> int:
    return measured.memory.get(TEMPORARIES, 0)


def _doublings(first: int, last: int) -> list[int]:
    return [first * 2**n for n in range(max(int(math.log2(max(last // first, 1))) + 1, 1))]


def _rematerialisable(config: ConfigDict) -> list[str]:
    """Dotted names of the trained models' `options.remat` that are off."""
    found = []

    def visit(node, path):
        for key in node:
            child = node[key]
            if isinstance(child, ConfigDict) and key != "teacher":
                if key == "options" and child.get("remat", None) is False:
                    found.append(f"{path}options.remat")
                visit(child, f"{path}{key}.")

    visit(config, "")
    return found
