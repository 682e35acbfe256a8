"""Seals a finished folder with the size and checksum of every file, so that later damage is found before it is read."""

import json
import os
import pathlib
import zlib

NAME = "seal.json"


def _sums(folder: pathlib.Path) -> dict[str, list[int]]:
    found = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME):
        total = 0
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                total = zlib.crc32(block, total)
        found[str(file.relative_to(folder))] = [file.stat().st_size, total]
    return found


def write(folder: pathlib.Path) -> None:
    """Writes the seal of a folder that will not change any more; a sealed one is left alone."""
    target = folder / NAME
    if target.exists() or not folder.is_dir():
        return
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(_sums(folder)))
    os.replace(temporary, target)


def damage(folder: pathlib.Path) -> str | None:
    """What differs from the seal, as a phrase naming the file; None for an intact folder or one without a seal."""
    target = folder / NAME
    if not target.exists():
        return None
    try:
        expected = json.loads(target.read_text())
    except ValueError:
        return f"{NAME} is unreadable"
    found = _sums(folder)
    for name, (size, total) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes of {size}"
        if found[name][1] != total:
            return f"{name} has changed"
    return None
