"""Executables on file: compiled ahead on a machine without accelerators, loaded by the job that runs them.

A file is one line of magic, one line of JSON and the executables. The JSON says what they were compiled for: versions,
topology, the config, and the shapes and shardings of their inputs, so that a job with anything else is told what
differs. JAX serialises executables with pickle: load only files that you made.
"""

import fnmatch
import json
import os
from importlib import metadata
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from ml_collections import ConfigDict

from research.core import config as configs
from research.core import sharding, storage
from research.core.errors import UserError
from research.core.runner import Runner

MAGIC = b"stillroom executable 1\n"
STEPS = ("train", "eval")
# Keys of a config that do not reach the program.
FREE = ("log.*", "save.*", "*workers", "teacher.workdir", "teacher.recipe", "*weights", "data.path", "data.on_corrupt")


def save(file: str | os.PathLike, runner: Runner, config: ConfigDict, compiled: dict[str, Any], batches: dict) -> int:
    """Writes the compiled steps of a runner; returns the file's bytes.

    Args:
      file: where; replaced whole.
      runner: whose steps they are.
      config: resolved.
      compiled: {"train": ..., "eval": ...} as `jax.stages.Compiled`.
      batches: {"train": ..., "eval": ...} of {name: ShapeDtypeStruct}.
    Raises:
      UserError: the platform's executables cannot be serialised.
    """
    bodies = {}
    for step in STEPS:
        try:
            bodies[step] = serialize_executable.serialize(compiled[step])[0]
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            raise UserError(f"--save: this executable cannot be written: {error}") from None
    header = describe(runner, config) | {
        "batches": {step: {k: [v.dtype.name, list(v.shape)] for k, v in batches[step].items()} for step in STEPS},
        "sizes": {step: len(body) for step, body in bodies.items()},
    }
    draft = f"{os.fspath(file)}.part"
    with open(draft, "wb") as out:
        out.write(MAGIC + json.dumps(header).encode() + b"\n")
        out.writelines(bodies[step] for step in STEPS)
    os.replace(draft, file)
    return os.path.getsize(file)


def load(file: str | os.PathLike, runner: Runner, config: ConfigDict) -> Runner:
    """The runner with the file's compiled steps in place of its own, which then need no compilation.

    Raises:
      FileNotFoundError: no such file.
      UserError: it is no such file, or was made for other versions, devices, config or shapes; names what differs.
    """
    header, bodies = _read(file)
    check(file, header, runner, config)
    devices = list(runner.shapes.step.sharding.mesh.devices.reshape(-1))
    loaded = {}
    for step in STEPS:
        batch = {k: jax.ShapeDtypeStruct(tuple(s), t) for k, (t, s) in header["batches"][step].items()}
        function = runner.train_step if step == "train" else runner.eval_step
        structures = [jax.tree.structure(((runner.shapes, batch), {}))]
        structures.append(jax.tree.structure(jax.eval_shape(function, runner.shapes, batch)))
        try:
            loaded[step] = serialize_executable.deserialize_and_load(
                bodies[step], *structures, backend=devices[0].client, execution_devices=devices
            )
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"{file}: this machine cannot load it: {str(error).splitlines()[0]}") from None
    return runner._replace(train_step=loaded["train"], eval_step=loaded["eval"])


def describe(runner: Runner, config: ConfigDict) -> dict[str, Any]:
    """What an executable depends on, as JSON holds it."""
    mesh = runner.shapes.step.sharding.mesh
    devices = mesh.devices.reshape(-1)
    return {
        "versions": versions(devices[0].platform),
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": len({d.process_index for d in devices}),
            "slices": len({getattr(d, "slice_index", None) for d in devices}),
            "mesh": dict(mesh.shape),
            # Where each position of the mesh is on the torus, which numbers of devices need not tell.
            "order": [[*d.coords, d.core_on_chip] if hasattr(d, "coords") else d.id for d in devices],
        },
        "config": configs.plain(config),
        "state": {
            path: [leaf.dtype.name, list(leaf.shape), str(leaf.sharding.spec)]
            for path, leaf in sharding.paths(runner.shapes)
        },
    }


def versions(platform: str) -> dict[str, str]:
    """The versions that have to agree; libtpu's among them on TPUs."""
    found = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    if platform == "tpu":
        found["libtpu"] = metadata.version("libtpu")
    return found


def check(file: str | os.PathLike, header: dict, runner: Runner, config: ConfigDict) -> None:
    """Raises UserError with a line for everything that differs between a file's header and this run."""
    here = describe(runner, config)
    lines = []
    for part in ("versions", "devices"):
        theirs, ours = header[part], json.loads(json.dumps(here[part]))
        lines += [
            f"{name}: {_short(theirs.get(name))}, here {_short(ours.get(name))}"
            for name in {**theirs, **ours}
            if theirs.get(name) != ours.get(name)
        ]
    kept = [
        {k: v for k, v in configs.flat(tree).items() if not any(fnmatch.fnmatchcase(k, p) for p in FREE)}
        for tree in (header["config"], here["config"])
    ]
    lines += [f"config.{line}" for line in configs.difference(*kept)]
    if not lines and header["state"] != here["state"]:
        other = [k for k in {**header["state"], **here["state"]} if header["state"].get(k) != here["state"].get(k)]
        lines.append(f"{other[0]}: {header['state'].get(other[0])}, here {here['state'].get(other[0])}")
    if lines:
        raise UserError(
            f"{file}: compiled for something else; compile it again, or leave it out\n  " + "\n  ".join(lines)
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read(file: str | os.PathLike) -> tuple[dict, dict[str, bytes]]:
    with storage.folder(file).open("rb") as source:
        if source.readline(len(MAGIC)) != MAGIC:
            raise UserError(f"{file}: not an executable that launch.compile --save wrote")
        try:
            header = json.loads(source.readline())
        except ValueError:
            raise UserError(f"{file}: its header cannot be read; save it again") from None
        bodies = {step: source.read(header["sizes"][step]) for step in STEPS}
    if any(len(bodies[step]) != header["sizes"][step] for step in STEPS):
        raise UserError(f"{file}: cut short; save it again")
    return header, bodies
