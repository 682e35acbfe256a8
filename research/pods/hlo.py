"""What a compiled program does, read from its text: collectives, loops, and the compiler's own estimate of cycles.

`compiled.as_text()` is optimised HLO: named computations of one instruction a line. An instruction runs as often as its
computation: once in the entry, trip-count times in a loop's body, the product in nested loops. XLA's cost analysis on
TPU counts a body once, hence this reader.
"""

import re
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s2": 0.25, "u2": 0.25, "bf16": 2, "f4e2m1fn": 0.5, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# Instructions that only name or group what others have made.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Collective(NamedTuple):
    """One instruction that moves data between devices.

    Attributes:
      kind: one of KINDS.
      bytes: payload on one device: the whole array of an all-reduce, what an all-gather makes, what a reduce-scatter
        takes, what the others send.
      groups: rows of positions in the mesh's flat order that exchange with each other; of a permutation, its
        (source, target) pairs. None where all devices do, or the notation is not known.
      count: executions a step.
      name: the operation of the model it comes from.
      network: it joins the slices of a TPU pod; such an instruction is a transfer to the host, and has no groups.
    """

    kind: str
    bytes: float
    groups: np.ndarray | None
    count: int
    name: str
    network: bool = False


class Program(NamedTuple):
    """A program's collectives, and sums over its instructions.

    Attributes:
      collectives: one entry an instruction.
      cycles: the TPU compiler's estimates of its fused operations, loops multiplied out; 0 where it makes none. They
        leave out collectives and what transfers could overlap.
      bytes: what instructions read and write in main memory, loops multiplied out; arrays that the compiler keeps in
        the TPU's on-chip memory are left out, which XLA's own count of bytes includes.
      unknown_loops: loops whose length depends on data; counted as one iteration.
      places: the cycles by place in the source, numbers of layers as `*`: {"jvp(ViT)/blocks_*/attn": 12345}.
    """

    collectives: list[Collective]
    cycles: int
    bytes: float
    unknown_loops: int
    places: dict[str, int]


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations, entry = _computations(text)
    counts, fused, unknown = _counts(computations, entry)
    collectives, places, moved = [], Counter(), 0.0
    for name, lines in computations.items():
        if not counts[name]:
            continue
        if name not in fused:
            moved += counts[name] * _moved(lines)
        for line in lines:
            found = _CYCLES.search(line)
            if found and name not in fused:
                places[_place(line)] += int(found[1]) * counts[name]
            collective = _collective(line, counts[name], name)
            if collective:
                collectives.append(collective)
    return Program(collectives, places.total(), moved, unknown, dict(places.most_common()))


def _place(line: str) -> str:
    """`jit(step)/jvp(ViT)/blocks_3/attn/dot_general` as `jvp(ViT)/blocks_*/attn`."""
    name = re.search(r'op_name="([^"]*)"', line)
    parts = name[1].split("/") if name else []
    return re.sub(r"\d+", "*", "/".join(parts[1:4] if len(parts) < 5 else parts[1:-1][:3])) or "other"


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(computation -> its instructions, the entry's name)."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("HloModule", "}")) or not line:
            current = None if line.startswith("}") else current
        elif not line[0].isspace():
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif current is not None:
            current.append(line)
    return computations, entry


def _counts(computations: dict[str, list[str]], entry: str) -> tuple[dict[str, int], set[str], int]:
    """(computation -> how often it runs a step, those inside fusions, loops of unknown length)."""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    fused, unknown = set(), 0
    for name, lines in computations.items():
        for line in lines:
            if "=%" not in line and "={%" not in line:
                continue
            opcode = _OPCODE.search(line)
            if opcode and opcode[1].endswith(("-done", "-update")):  # the start has counted it
                continue
            called = [found[2] for found in _CALLED.finditer(line)]
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            times = 1
            if opcode and opcode[1] == "while":
                known = _trip_count(line, computations)
                times, unknown = known or 1, unknown + (known is None)
            if opcode and opcode[1] == "fusion":
                fused.update(called)
            calls[name] += [(callee, times) for callee in called if callee in computations]
    counts: dict[str, int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for callee, repeated in calls[name]:
            visit(callee, times * repeated)

    visit(entry, 1)
    for name in list(fused):
        fused.update(callee for callee, _ in calls[name])
    return counts, fused, unknown


def _trip_count(line: str, computations: dict[str, list[str]]) -> int | None:
    """Iterations of a while instruction: what the compiler notes, else the constant that its condition compares with.

    A `lax.scan` counts from 0 in ones; a loop whose condition is anything else has no known length.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    root = next((text for text in lines if text.lstrip().startswith("ROOT")), "")
    called = re.search(r"calls=%?([\w.\-]+)", root)
    compared = root if not called else next(iter(_roots(computations.get(called[1], []))), "")
    if " compare(" not in compared or "direction=LT" not in compared:
        return None
    constants = [re.search(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", text) for text in lines]
    values = [int(c[2]) for c in constants if c and re.search(rf"%?{re.escape(c[1])}\b", root.partition("(")[2])]
    return values[0] if len(values) == 1 else None


def _roots(lines: list[str]) -> list[str]:
    return [line for line in lines if line.lstrip().startswith("ROOT")]


def _collective(line: str, count: int, computation: str) -> Collective | None:
    _, equals, right = line.partition(" = ")
    opcode = _OPCODE.search(" " + right) if equals else None
    if opcode is None:
        return None
    if opcode[1] == "send":
        return _between_slices(line, right[: opcode.start()], count)
    kind = opcode[1].removesuffix("-start")
    if kind not in KINDS:
        return None
    started = opcode[1].endswith("-start")
    groups = _groups(line, kind)
    size = groups.shape[-1] if groups is not None and kind != "collective-permute" else 1
    payload = _payload(right[: opcode.start()])
    if kind == "all-gather" and started:
        payload *= size / (size + 1)  # the result lists operands beside what is made of them
    elif kind == "collective-permute" and started:
        payload = _payload(re.sub(r"u32\[\]", "", right[: opcode.start()])) / 2
    elif kind == "reduce-scatter":
        payload *= size
    elif kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # as the TPU compiler writes it: both inside one fusion
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, payload, groups, count, name[1] if name else "")


def _between_slices(line: str, result: str, count: int) -> Collective | None:
    """What the TPU compiler makes of the part of a collective that crosses slices: a send to the host's transport."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    if found is None:
        return None
    kind = "collective-permute" if found[1] == "ONE_TO_ONE" else found[1].lower().replace("_", "-")
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', line)
    array = _SHAPE.search(result)  # (what is sent, a flag, a token)
    return Collective(kind, _payload(array[0]) if array else 0.0, None, count, name[1] if name else "", True)


def _moved(lines: list[str]) -> float:
    """Bytes that the instructions of one computation read and write in main memory."""
    sizes: dict[str, float] = {}
    total = 0.0
    for line in lines:
        name, _, right = line.partition(" = ")
        opcode = _OPCODE.search(" " + right)
        if opcode is None:
            continue
        kind, result = opcode[1], right[: opcode.start()]
        if kind.endswith("-start"):  # (what it makes, its operand, a flag)
            result = result.lstrip("( ").partition(", ")[0] if kind in ("copy-start", "slice-start") else result
        # The layout of an array in on-chip memory ends in S(1): `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`.
        size = sum(_payload(array) for array in re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", result) if "S(" not in array)
        sizes[name.split()[-1].lstrip("%")] = size
        if kind not in _FREE and not kind.endswith(("-done", "-update")):
            operands = right[opcode.end() - 1 :].partition(")")[0]
            total += size + sum(sizes.get(operand, 0.0) for operand in re.findall(r"%([\w.\-]+)", operands))
    return total


def _payload(shapes: str) -> float:
    """Bytes of all arrays in a type such as `(f32[8,4]{1,0}, bf16[2])`."""
    total = 0.0
    for dtype, sides in _SHAPE.findall(shapes):
        bits = re.search(r"\d+", dtype)
        size = _BYTES.get(dtype) or (1 if dtype.startswith("f8") else int(bits[0]) / 8 if bits else 0)
        total += size * np.prod([int(side) for side in sides.split(",") if side], dtype=float)
    return total


def _groups(line: str, kind: str) -> np.ndarray | None:
    """Rows of positions that take part together, from any of the notations of `replica_groups`."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", line)
        return (
            np.array([[int(n) for n in p.split(",")] for p in re.findall(r"\{([\d,]+)\}", pairs[1])]) if pairs else None
        )
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if listed:
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed[1])]
        return np.array(rows) if len({len(row) for row in rows}) == 1 else None
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, sides, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        ids = np.arange(np.prod(sides)).reshape(sides)
        return (ids.transpose(order) if order else ids).reshape(shape)
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]\))? \{([^}]*)\}", line)
    if axes and axes[2] is None:
        return _mesh_groups(axes[1], axes[3])
    return None


def _mesh_groups(mesh: str, used: str) -> np.ndarray | None:
    """Groups of `mesh['a'=8,'b'=32] {'b'}`: they run over the named axes. None for parts of an axis."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
    names = [part.strip().strip("'") for part in used.split(",")]
    if any(name not in sizes for name in names):
        return None
    kept = [axis for axis, name in enumerate(sizes) if name not in names]
    over = [axis for axis, name in enumerate(sizes) if name in names]
    ids = np.arange(np.prod(list(sizes.values()))).reshape(list(sizes.values()))
    return ids.transpose(kept + over).reshape(-1, int(np.prod([list(sizes.values())[axis] for axis in over])))
