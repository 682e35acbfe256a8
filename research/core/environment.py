"""What a run ran on: versions, devices, commit and command, for `environment.json`."""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import jax

from research.core import storage

PACKAGES = ("stillroom", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")


def environment() -> dict:
    """Versions, machine, devices, git commit and command of this process; names no home folder."""
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [_tilde(word) for word in (pathlib.Path(sys.executable).name, *sys.orig_argv[1:])],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "backend": devices[0].platform,
        "devices": {kind: sum(device.device_kind == kind for device in devices) for kind in kinds},
        "processes": jax.process_count(),
        "commit": _commit(),
    }


def write(workdir: str | os.PathLike) -> None:
    """Writes `environment.json` of the run folder (process 0 alone); a resumed run's replaces the earlier one."""
    if jax.process_index() == 0:
        storage.write(storage.folder(workdir) / "environment.json", json.dumps(environment(), indent=2) + "\n")


def _tilde(word: str) -> str:
    return word.replace(str(pathlib.Path.home()), "~")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this file is tracked in, with `+` where tracked files were changed; None elsewhere."""

    def git(*args):
        here = pathlib.Path(__file__).resolve()
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
