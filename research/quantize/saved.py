"""What calibration leaves on disk after each window, so that it can go on from there.

A folder holds `calibration.json` (what was asked: another request is refused), a file for each finished block, one of
what the method carries on, and `progress.json`, written last: what it does not count does not exist.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from research.core import storage
from research.core.errors import UserError
from research.port import tensors
from research.quantize.quantized import Quantized, check

IDENTITY, PROGRESS = "calibration.json", "progress.json"
_PARTS = ("codes", "scales", "zeros", "order")
_STATED = ("bits", "axis", "group", "length")


class Store:
    """A calibration's folder.

    Args:
      identity: flat, of what JSON holds; whatever changes the result.
    Raises:
      UserError: the folder holds another calibration; the text names the first key that differs.
    """

    def __init__(self, folder: str | os.PathLike, identity: Mapping[str, Any]):
        self.folder = storage.folder(folder)
        asked, file = json.loads(json.dumps(identity)), self.folder / IDENTITY
        if file.is_file():
            found = json.loads(file.read_text())
            for key in sorted({*asked, *found}):
                if asked.get(key) != found.get(key):
                    raise UserError(
                        f"{self.folder}: holds a calibration with {key} {found.get(key)}, not {asked.get(key)}: "
                        "resume it with the same settings, or give another folder"
                    )
        else:
            storage.write(file, json.dumps(asked, indent=2))

    def done(self) -> int:
        """Blocks that are finished."""
        file = self.folder / PROGRESS
        return json.loads(file.read_text())["blocks"] if file.is_file() else 0

    def block(self, index: int) -> tuple[dict, dict]:
        """(weights, steps) of a finished block."""
        found = tensors.read(self._block(index))
        return unflat(_of(found, "weights")), _of(found, "steps")

    def carried(self) -> dict[int, Any]:
        """What the method carries on, by block."""
        file = self._carried(self.done())
        if not file.is_file():
            return {}
        tree = traverse_util.unflatten_dict(tensors.read(file), sep="|")
        return {int(index): own for index, own in tree.items()}

    def write(self, first: int, finished: Sequence[tuple[dict, dict]], carried: Mapping[int, Any]) -> None:
        """Adds blocks from `first` on, as `block` gives them, and replaces what is carried on: nested dicts."""
        for index, (weights, steps) in enumerate(finished, first):
            arrays = {f"weights|{k}": v for k, v in flat(weights).items()} | {f"steps|{k}": v for k, v in steps.items()}
            tensors.write(self._block(index), jax.tree.map(np.asarray, arrays), {})
        done = first + len(finished)
        held = {str(i): own for i, own in carried.items() if own is not None}
        if held:
            arrays = traverse_util.flatten_dict(held, sep="|")
            tensors.write(self._carried(done), jax.tree.map(np.asarray, arrays), {})
        storage.write(self.folder / PROGRESS, json.dumps({"blocks": done}))
        for index in range(first + 1):
            self._carried(index).unlink(missing_ok=True)

    def _block(self, index: int) -> storage.Path:
        return self.folder / f"block_{index:04d}.safetensors"

    def _carried(self, done: int) -> storage.Path:
        return self.folder / f"carried_{done:04d}.safetensors"


def flat(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A block's arrays by path, those of a `Quantized` as `path#codes`, `path#scales` ... and `path#form`."""
    found = {}
    for path, w in weights.items():
        if not isinstance(w, Quantized):
            found[path] = w
            continue
        found |= {f"{path}#{part}": array for part in _PARTS if (array := getattr(w, part)) is not None}
        found[f"{path}#form"] = np.array([getattr(w, name) for name in _STATED], np.int64)
    return found


def unflat(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    found: dict[str, Any] = {path: w for path, w in arrays.items() if "#" not in path}
    for path in [path.removesuffix("#form") for path in arrays if path.endswith("#form")]:
        stated = dict(zip(_STATED, map(int, arrays[f"{path}#form"]), strict=True))
        found[path] = check(Quantized(*(arrays.get(f"{path}#{part}") for part in _PARTS), **stated))
    return found


def _of(arrays: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {path.removeprefix(f"{kind}|"): w for path, w in arrays.items() if path.startswith(f"{kind}|")}
