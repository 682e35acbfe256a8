"""Seals a finished folder with what its files are, so that later damage is found before it is read.

The seal holds the size of every file, and the checksum of those up to SUMMED bytes: one process seals for all, and must
not read the hundreds of gigabytes that a pod has written. A large file that was cut off is found; one in which bits
were changed is left to the reading of it (Orbax's own formats carry checksums for their indices).
"""

import json
import logging
import os
import zlib

from research.core import storage

LOG = logging.getLogger(__name__)

NAME = "seal.json"
SUMMED = 64 << 20  # bytes of the largest file that is read to be sealed


def _files(folder: storage.Path) -> dict[str, storage.Path]:
    """Every file below a folder by its relative name, but for the seal and drafts of it."""
    return {str(p.relative_to(folder)): p for p in storage.files(folder) if NAME not in p.name}


def _size(file: storage.Path) -> int:
    found = file.stat()
    return found.length if storage.remote(file) else found.st_size


def _sum(file: storage.Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def write(folder: str | os.PathLike) -> None:
    """Writes the seal of a folder that will not change any more; a sealed one is left alone.

    Where there is no room for it, the folder stays as good as it is, and unsealed.
    """
    folder = storage.folder(folder)
    if (folder / NAME).exists() or not folder.is_dir():
        return
    try:
        sizes = {name: _size(file) for name, file in _files(folder).items()}
        found = {name: [size, _sum(folder / name) if size <= SUMMED else None] for name, size in sizes.items()}
        storage.write(folder / NAME, json.dumps(found))
    except OSError as error:
        LOG.warning("%s is not sealed: %s", folder, error)


def damage(folder: str | os.PathLike) -> str | None:
    """What differs from the seal, as a phrase naming the file; None for an intact folder or one without a seal."""
    folder = storage.folder(folder)
    if not (folder / NAME).exists():
        return None
    try:
        expected = json.loads((folder / NAME).read_text())
    except ValueError:
        return f"{NAME} is unreadable"
    found = _files(folder)
    for name, (size, total) in expected.items():
        if name not in found:
            return f"{name} is missing"
        if (now := _size(found[name])) != size:
            return f"{name} has {now} bytes of {size}"
        if total is not None and _sum(found[name]) != total:
            return f"{name} has changed"
    return None
