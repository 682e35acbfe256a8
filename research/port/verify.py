"""Checks this code against golden arrays of official implementations: `python -m research.port.verify PATH...`.

A golden file `<method>/<case>.npz` or `<method>/<case>__<variant>.npz` holds weights `w/`, inputs `x/`, expected outputs
`y/` and a JSON string `meta`. Each is recomputed by `research.port.checks.<method>.CHECKS[case]` and compared. The arrays
were made in float64, so the check runs in float64 too: it tests the mathematics, not the rounding of a device.
Exit status 0 only if every file passes.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import pathlib
import re
import sys
import traceback

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file: `w`, `x`, `y` map names to arrays, `meta` is its description."""

    path: pathlib.Path
    w: dict[str, np.ndarray]
    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    meta: dict

    @property
    def kwargs(self) -> dict:
        """The official constructor arguments, whatever key the file uses for them."""
        for key in ("constructor", "kwargs", "args"):
            if key in self.meta:
                return self.meta[key]
        return {}

    @property
    def method(self) -> str:
        return self.path.parent.name

    @property
    def case(self) -> str:
        return self.path.stem.split("__")[0]


def load(path: str | pathlib.Path, dtype=np.float64) -> Golden:
    """Reads a golden file, with floating arrays widened to `dtype`."""
    groups: dict[str, dict] = {"w": {}, "x": {}, "y": {}}
    with np.load(path) as data:
        meta = json.loads(str(data["meta"]))
        for key in data.files:
            kind, _, name = key.partition("/")
            if kind in groups:
                array = data[key]
                groups[kind][name] = array.astype(dtype) if array.dtype.kind == "f" else array
    return Golden(pathlib.Path(path), **groups, meta=meta)


def tolerance(golden: Golden) -> tuple[float, float, float]:
    """(rtol of values, rtol of gradients, atol) from the file's own suggestion; the backbones' standard where it has none."""
    text = golden.meta.get("suggested_tolerance", "")
    found = [float(v) for v in re.findall(r"rtol\s*=?\s*([0-9.e-]+)", str(text))]
    floor = [float(v) for v in re.findall(r"atol\s*=?\s*([0-9.e-]+)", str(text))]
    rtol = found[0] if found else 1e-5
    return rtol, max([rtol, *found[1:2]]), min(floor) if floor else 1e-7


def compare(golden: Golden, ours: dict[str, np.ndarray]) -> tuple[bool, str]:
    """Compares every expected output; returns (all within tolerance, a line with the largest errors)."""
    missing = sorted(set(golden.y) - set(ours))
    if missing:
        return False, f"not computed: {', '.join(missing)}"
    rtol, rtol_grad, atol = tolerance(golden)
    worst, passed = (-1.0, "", 0.0, 0.0), True
    largest_abs = largest_rel = 0.0
    for key, expected in golden.y.items():
        got = np.asarray(ours[key])
        if got.shape != expected.shape:
            return False, f"{key}: shape {got.shape}, expected {expected.shape}"
        got, expected = got.astype(np.float64), expected.astype(np.float64)
        error = np.abs(got - expected)
        scale = np.max(np.abs(expected), initial=0.0)
        # Relative to the array's largest entry as well: single entries near zero carry the rounding of their neighbours.
        allowed = atol + (rtol_grad if key.startswith("grad") else rtol) * np.maximum(np.abs(expected), 0.1 * scale)
        ratio = float(np.max(error / allowed, initial=0.0)) if np.all(np.isfinite(got)) else float("inf")
        passed &= ratio <= 1.0
        largest_abs = max(largest_abs, float(np.max(error, initial=0.0)))
        largest_rel = max(largest_rel, float(np.max(error, initial=0.0) / scale) if scale else 0.0)
        worst = max(worst, (ratio, key, 0.0, 0.0))
    return passed, f"max_abs={largest_abs:.2e} max_rel={largest_rel:.2e} tol={rtol:.0e} (worst: {worst[1]})"


def check(path: str | pathlib.Path) -> tuple[bool, str]:
    """Runs one golden file; returns (passed, its report line)."""
    path = pathlib.Path(path)
    name = f"{path.parent.name}/{path.stem}"
    try:
        golden = load(path)
        module = f"research.port.checks.{golden.method}"
        found = importlib.util.find_spec(module) is not None
        function = getattr(importlib.import_module(module), "CHECKS", {}).get(golden.case) if found else None
        if function is None:
            return False, f"FAIL {name} no checker for case {golden.case!r} of method {golden.method!r}"
        passed, line = compare(golden, function(golden))
    except Exception as error:  # a broken case must not hide the others; the trace goes to stderr
        traceback.print_exc()
        passed, line = False, f"{type(error).__name__}: {error}".splitlines()[0]
    return passed, f"{'PASS' if passed else 'FAIL'} {name} {line}"


def expand(paths: list[str]) -> list[pathlib.Path]:
    """The golden files named by files and folders, sorted; a path that holds none is an error."""
    files = []
    for path in map(pathlib.Path, paths):
        found = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
        if not found or not all(f.is_file() for f in found):
            raise SystemExit(f"verify: no golden file at {path}")
        files += found
    return files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="PATH", help="golden files or folders of them")
    results = []
    with jax.enable_x64(True):
        for path in expand(parser.parse_args(argv).paths):
            passed, line = check(path)
            print(line, flush=True)
            results.append(passed)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
