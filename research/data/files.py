"""Images in class folders, on disk or inside a zip.

The layout is `<root>/<split>/<class>/.../<image>` or `<root>/<class>/.../<image>`; flat ImageNet names
(`n01440764_10026.JPEG`) give the class themselves. Classes and images are in the order of their names. Class labels are
taken over all splits together, so that a class absent from one split does not shift the others' labels.
"""

import os
import pathlib
import re
import struct
import zipfile
import zlib

import numpy as np

from research.core.errors import UserError
from research.data.base import BadExample, Source, choose_split

SUFFIXES = (".jpg", ".jpeg", ".png")
SPLITS = {"train", "training", "val", "valid", "validation", "eval", "test", "testing"}
_WORDNET = re.compile(r"(n\d{8})_")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then lengths of the name and of the extra field


class Files(Source):
    """Images named by relative paths; `root` is where `where()` says they are."""

    def __init__(self, root: pathlib.Path, split: str | None, paths: list[str]):
        self.root = root
        chosen, class_names = arrange(str(root), paths, split)
        self.paths = [path for path, _ in chosen]
        super().__init__(f"{root}{f' ({split})' if split else ''}", class_names, [label for _, label in chosen])

    def where(self, index: int) -> str:
        return f"{self.root}/{self.paths[index]}"


class Folder(Files):
    """A tree of class folders."""

    def image(self, index: int) -> bytes:
        try:
            return (self.root / self.paths[index]).read_bytes()
        except OSError as error:
            raise BadExample(f"cannot be read ({error.strerror})") from None


def folder(root: pathlib.Path, split: str | None = None) -> Files:
    """Opens a tree of class folders of JPEG or PNG files."""
    return Folder(root, split, _images_below(root))


def folder_splits(root: pathlib.Path) -> list[str]:
    """The names of the splits of such a tree; [] where it has none."""
    return find_splits(_images_below(root))


def _images_below(root: pathlib.Path) -> list[str]:
    paths = []
    for place, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = os.path.relpath(place, root)
        paths += [name if base == "." else f"{base}/{name}".replace(os.sep, "/") for name in names if _is_image(name)]
    return paths


class Archive(Files):
    """A zip of class folders, read in place: nothing is extracted.

    Each read asks for its own bytes by position, without a lock: threads and forked processes share one open file, and
    a process that receives the source by pickle opens its own.
    """

    def __init__(self, root: pathlib.Path, split: str | None, entries: dict[str, zipfile.ZipInfo]):
        super().__init__(root, split, list(entries))
        chosen = [entries[path] for path in self.paths]
        self._offset = np.array([e.header_offset for e in chosen], np.int64)
        self._stored = np.array([e.compress_size for e in chosen], np.int64)
        self._size = np.array([e.file_size for e in chosen], np.int64)
        self._crc = np.array([e.CRC for e in chosen], np.uint32)
        self._deflated = np.array([e.compress_type == zipfile.ZIP_DEFLATED for e in chosen], bool)
        self._file = os.open(root, os.O_RDONLY)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _file=os.open(state["root"], os.O_RDONLY))

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def image(self, index: int) -> bytes:
        start = int(self._offset[index])
        header = os.pread(self._file, _LOCAL_HEADER.size, start)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise BadExample("the archive is damaged at this entry")
        _, name, extra = _LOCAL_HEADER.unpack(header)
        data = os.pread(self._file, int(self._stored[index]), start + _LOCAL_HEADER.size + name + extra)
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS) if self._deflated[index] else data
        except zlib.error as error:
            raise BadExample(f"cannot be unpacked ({error})") from None
        if len(data) != self._size[index] or zlib.crc32(data) != self._crc[index]:
            raise BadExample("differs from its checksum in the archive")
        return data


def archive(path: pathlib.Path, split: str | None = None) -> Files:
    """Opens a zip of class folders of JPEG or PNG files.

    Raises UserError for a file that is no zip, an encrypted or exotically compressed entry, and an entry whose name
    climbs out of the archive: nothing is extracted here, but such an archive is not to be trusted.
    """
    return Archive(path, split, _images_inside(path))


def archive_splits(path: pathlib.Path) -> list[str]:
    """The names of the splits of such a zip; [] where it has none."""
    return find_splits(list(_images_inside(path)))


def _images_inside(path: pathlib.Path) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"data.path: {path} is not a readable zip ({error}); copy or download it again") from None
    for entry in entries:
        name = entry.orig_filename.replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
            raise UserError(f"data.path: {path} has an entry that climbs out of it, {entry.orig_filename!r}: refused")
    images = {entry.filename: entry for entry in entries if not entry.is_dir() and _is_image(entry.filename)}
    for name, entry in images.items():
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"data.path: {path}: {name!r} is encrypted or not deflate-compressed; make the zip anew")
    return images


def _is_image(path: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.split("/"))
    return path.lower().endswith(SUFFIXES) and not hidden


def find_splits(paths: list[str], wanted: str | None = None) -> list[str]:
    """The folders of relative image paths that are splits: those with usual names, or any if `wanted` is among them."""
    parts = [path.split("/") for path in sorted(paths)]
    skip = _wrappers(parts) if parts else 0
    tops = sorted({p[skip] for p in parts if len(p) > skip + 1})
    return tops if tops and (wanted in tops or all(top.lower() in SPLITS for top in tops)) else []


def arrange(root: str, paths: list[str], split: str | None) -> tuple[list[tuple[str, int]], list[str]]:
    """Finds split and class of relative image paths.

    Returns:
      ((path, label) of the chosen split in the order of the names, class names).
    Raises:
      UserError: no images, no such split, a split that has to be named, or images outside class folders.
    """
    if not paths:
        raise UserError(f"data.path: {root} holds no images ({', '.join(SUFFIXES)}), in it or below")
    parts = {path: path.split("/") for path in sorted(paths)}
    skip = _wrappers(list(parts.values()))
    tops = sorted({p[skip] for p in parts.values() if len(p) > skip + 1})
    has_splits = bool(find_splits(paths, split))
    if has_splits:
        choose_split(split, tops, root)
    elif split:
        raise UserError(
            f"data.split or eval.split: no {split!r}; {root} has no splits, only classes ({', '.join(tops[:3])}, ...): "
            "put them into folders train and test, or leave the option empty"
        )
    skip += has_splits
    classes = {path: _class_of(root, path, p[skip:]) for path, p in parts.items()}
    names = sorted(set(classes.values()))
    label = {name: number for number, name in enumerate(names)}
    chosen = [(path, label[classes[path]]) for path, p in parts.items() if not has_splits or p[skip - 1] == split]
    return chosen, names


def _wrappers(parts: list[list[str]]) -> int:
    """How many folders wrap the whole tree, as `cifar10` in `cifar10/train/...`: those to step over."""
    depth = 0
    while min(map(len, parts)) > depth + 2 and len({p[depth] for p in parts}) == 1 and parts[0][depth] not in SPLITS:
        depth += 1
    return depth


def _class_of(root: str, path: str, below: list[str]) -> str:
    if len(below) > 1:
        return below[0]
    named = _WORDNET.match(below[0])
    if not named:
        raise UserError(f"data.path: {root}: {path} is in no class folder; the layout is [<split>/]<class>/<image>")
    return named[1]
