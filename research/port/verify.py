"""Checks this code against golden arrays of official implementations: `python -m research.port.verify PATH...`.

A golden file `<method>/<case>.npz` or `<method>/<case>__<variant>.npz` holds weights `w/`, inputs `x/`, expected
outputs `y/` and a JSON string `meta`. Each is recomputed by `research.port.checks.<method>.CHECKS[case]` and compared.
The arrays were made in float64, so the check runs in float64 too: it tests the mathematics, not the rounding of a
device. Integers must be equal; what is allowed for other values is said at `tolerance` and `allowed_error`.
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
        return self.path.resolve().parent.name

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


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Relative and absolute error a value may have."""

    rtol: float
    atol: float = np.inf


def tolerance(golden: Golden) -> tuple[Tolerance, Tolerance]:
    """What the file's own suggestion allows for values and for gradients.

    The suggestion is a text such as "rtol 1e-5, atol 1e-6 (float32); gradients rtol 1e-4, atol 1e-7". Gradients have
    the tolerance of values where it names none of their own; a file without suggestion has 1e-5 and 1e-4.
    """
    text = str(golden.meta.get("suggested_tolerance", ""))
    values, _, gradients = text.partition("gradient")
    default = Tolerance(1e-5), Tolerance(1e-4)
    stated = _stated(values)
    return (stated or default[0]), (_stated(gradients) or stated or default[1])


def _stated(text: str) -> Tolerance | None:
    found = {kind: float(number) for kind, number in re.findall(r"([ra]tol)\s*=?\s*(\d[\d.]*(?:e[+-]?\d+)?)", text)}
    return Tolerance(**found) if "rtol" in found else None


def allowed_error(expected: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """The error allowed at each entry: `rtol` of the entry plus an absolute part.

    The absolute part is `rtol` of the array's largest entry and at most the stated `atol`, so that an `atol` meant for
    values around 1 does not wave through an array of tiny gradients. Below 1e-12 everything is rounding.
    """
    size = np.where(np.isfinite(expected), np.abs(expected), 0.0)
    return tolerance.rtol * size + max(min(tolerance.atol, tolerance.rtol * np.max(size, initial=0.0)), 1e-12)


def compare(golden: Golden, ours: dict[str, np.ndarray]) -> tuple[bool, str]:
    """Compares every expected output; returns (all within tolerance, a line with the largest errors)."""
    missing = sorted(set(golden.y) - set(ours))
    if missing:
        return False, f"not computed: {', '.join(missing)}"
    values, gradients = tolerance(golden)
    worst, worst_key, largest_abs, largest_rel = -1.0, "", 0.0, 0.0
    for key, expected in golden.y.items():
        got = np.asarray(ours[key])
        if got.shape != expected.shape:
            return False, f"{key}: shape {got.shape}, expected {expected.shape}"
        exact = expected.dtype.kind != "f"
        got, expected = got.astype(np.float64), expected.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.where((got == expected) | (np.isnan(got) & np.isnan(expected)), 0.0, np.abs(got - expected))
        error = np.where(np.isnan(error), np.inf, error)
        limit = 0.5 if exact else allowed_error(expected, gradients if key.startswith("grad") else values)
        ratio = float(np.max(error / limit, initial=0.0))
        if ratio > worst:
            worst, worst_key = ratio, key
        scale = np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected))
        largest_abs = max(largest_abs, float(np.max(error, initial=0.0)))
        largest_rel = max(largest_rel, float(np.max(error, initial=0.0) / scale) if scale else 0.0)
    line = f"max_abs={largest_abs:.2e} max_rel={largest_rel:.2e} tol={values.rtol:.0e} (worst: {worst_key})"
    return worst <= 1.0, line


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
    except Exception as error:  # A broken case must not hide the others; the trace goes to stderr.
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
