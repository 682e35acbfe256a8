"""Where the time of a step goes: a trace of a few steps for xprof or TensorBoard, and its top operations as text.

    tensorboard --logdir runs/x/profile        # with the xprof plugin, or open the folder in xprof

The trace holds every process's own devices; the summary is that of process 0.
"""

import logging
import pathlib
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.profiler import ProfileData, StepTraceAnnotation

from research.core import storage
from research.core.errors import UserError
from research.core.runner import Runner

LOG = logging.getLogger(__name__)

FOLDER, SUMMARY = "profile", "summary.txt"
# What a fusion is called after, if it holds one.
HEAVY = ("convolution", "dot", "scatter", "gather", "sort", "reduce-window", "reduce", "copy", "transpose")
CONTAINERS = ("while", "conditional", "call")  # their time is that of the operations inside them


class Steps(NamedTuple):
    """Which steps to trace, counted from 1 at the start of the process, both included."""

    first: int
    last: int


class Op(NamedTuple):
    """One operation of the compiled program, summed over the traced steps and this process's devices.

    Attributes:
      name: of the HLO instruction.
      kind: its opcode; for a fusion that of its heaviest part, or elementwise.
      where: path of modules and functions it came from.
      seconds: device time.
      count: executions.
    """

    name: str
    kind: str
    where: str
    seconds: float
    count: int


def parse(text: str) -> Steps:
    """`20:24` or `20` (one step) as Steps; raises UserError for anything else."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    found = Steps(int(match[1]), int(match[2] or match[1])) if match else Steps(0, 0)
    if not 1 <= found.first <= found.last:
        raise UserError(f"--profile {text}: write FIRST:LAST, steps counted from 1, such as 20:24")
    return found


def traced(runner: Runner, steps: Steps, workdir: storage.Path) -> Runner:
    """The runner whose train step traces `steps` into `workdir/profile` and writes the summary after the last."""
    count, compiled, began = 0, None, 0.0
    local = tempfile.TemporaryDirectory() if storage.remote(workdir) else None  # the profiler writes to disks only
    folder = pathlib.Path(local.name) if local else workdir / FOLDER

    def train_step(state, batch):
        nonlocal count, compiled, began
        count += 1
        if compiled is None:  # ahead of time, to know the program's text; pmap does not offer that
            compilable = hasattr(runner.train_step, "lower")
            compiled = runner.train_step.lower(state, batch).compile() if compilable else runner.train_step
        if count == steps.first:
            with jax.transfer_guard("allow"):
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(folder))
            began = time.perf_counter()
        if not steps.first <= count <= steps.last:
            return compiled(state, batch)
        with StepTraceAnnotation("train", step_num=count):
            result = compiled(state, batch)
        if count == steps.last:
            jax.block_until_ready(result)
            seconds = time.perf_counter() - began
            jax.profiler.stop_trace()
            program = compiled.as_text() if hasattr(compiled, "as_text") else ""
            _finish(folder, workdir, steps, seconds, program, bool(local))
        return result

    return runner._replace(train_step=train_step)


def _finish(folder, workdir, steps: Steps, seconds: float, program: str, copy: bool) -> None:
    """Summarises the trace in `folder`, and copies it to a remote run folder."""
    files = [file for file in storage.files(folder) if file.name.endswith(".xplane.pb")]
    newest = max(files, key=lambda file: file.stat().st_mtime)
    if copy:
        for file in storage.files(newest.parent):
            storage.write(workdir / FOLDER / str(file.relative_to(folder)), file.read_bytes())
    if jax.process_index() == 0:
        text = summary(operations(newest, program), seconds, steps.last - steps.first + 1, jax.local_device_count())
        storage.write(workdir / FOLDER / SUMMARY, text)
        LOG.info("profile of steps %d to %d in %s\n%s", *steps, workdir / FOLDER, text)


def operations(trace: pathlib.Path, program: str = "") -> list[Op]:
    """The operations in an `.xplane.pb` file, the longest first.

    Args:
      trace: as the profiler wrote it.
      program: text of the compiled program, which tells kinds and origins.
    """
    known, sums = instructions(program), defaultdict(lambda: [0.0, 0])
    for name, seconds in _events(trace):
        sums[name][0] += seconds
        sums[name][1] += 1
    found = []
    for name, (seconds, count) in sums.items():
        kind, where = known.get(name, (re.sub(r"[.\d]+$", "", name), ""))
        if kind not in CONTAINERS:
            found.append(Op(name, kind, where, seconds, count))
    return sorted(found, key=lambda op: -op.seconds)


def _events(trace: pathlib.Path) -> Iterator[tuple[str, float]]:
    """(instruction, seconds) of every execution on a device."""
    for plane in ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            tpu = plane.name.startswith("/device:TPU") and line.name == "XLA Ops"
            for event in line.events:
                name = event.name.lstrip("%").partition(" ")[0] if tpu else dict(event.stats).get("hlo_op")
                if name:
                    yield name, event.duration_ns * 1e-9


def instructions(program: str) -> dict[str, tuple[str, str]]:
    """Instruction -> (kind, origin) of a compiled program's text. A fusion is of the kind of its heaviest part."""
    parts: dict[str, list[str]] = defaultdict(list)
    found: dict[str, tuple[str, str]] = {}
    computation = ""
    for line in program.splitlines():
        if line.endswith("{") and (header := re.match(r"(?:ENTRY )?%?([\w.-]+)", line)):
            computation = header[1]
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = .*?[\])}] ([a-z][\w-]*)\(", line):
            name, kind = match.groups()
            if kind == "fusion" and (called := re.search(r"calls=%?([\w.-]+)", line)):
                inside = parts[called[1]]  # computations stand before their callers
                kind = next((heavy for heavy in HEAVY if heavy in inside), "elementwise")
            parts[computation].append(kind)
            origin = re.search(r'op_name="([^"]*)"', line)
            found[name] = (kind, _short(origin[1]) if origin else "")
    return found


def _short(path: str) -> str:
    """An origin without the wrappers of transformations; those of gradients become `backward`."""
    backward = "transpose(" in path
    path = re.sub(r"^jit\([\w<>]*\)/", "", path)
    path = re.sub(r"\b(?:jit|jvp|transpose|vmap|remat|checkpoint)\(", "", path).replace(")", "")
    parts = [part for part in path.split("/") if part]
    return ("backward " if backward else "") + "/".join(parts)


def summary(ops: list[Op], seconds: float, steps: int, devices: int, top: int = 20) -> str:
    """A table of kinds and of the `top` operations, in milliseconds of a step on one device.

    Args:
      ops: from `operations`.
      seconds: wall time of the traced steps.
      steps, devices: how many of them.
    """
    share = 1e3 / (steps * devices)  # from summed seconds to milliseconds of a step
    busy = sum(op.seconds for op in ops)
    kinds: dict[str, float] = defaultdict(float)
    for op in ops:
        kinds[op.kind] += op.seconds
    spent = f"{steps} steps, {1e3 * seconds / steps:.3f} ms each"
    lines = [
        f"{spent}; {devices} local devices, busy {busy * share:.3f} ms a step",
        "",
        f"{'ms':>10} {'%':>6}  kind",
    ]
    total = busy or 1.0
    for kind, value in sorted(kinds.items(), key=lambda item: -item[1])[:top]:
        lines.append(f"{value * share:10.3f} {100 * value / total:6.1f}  {kind}")
    lines += ["", f"{'ms':>10} {'%':>6} {'calls':>6}  operation"]
    for op in ops[:top]:
        calls = op.count / (steps * devices)
        lines.append(f"{op.seconds * share:10.3f} {100 * op.seconds / total:6.1f} {calls:6.4g}  {op.name}  {op.where}")
    return "\n".join(line.rstrip() for line in lines) + "\n"
