"""Run folders on a disk or in an object store (`gs://bucket/run`): the few operations in which the two differ.

A local path stays a `pathlib.Path`; an address with a scheme becomes an `etils.epath.Path` with the same methods. An
object appears whole or not at all, but cannot be appended to: a log there is written again from memory, at intervals.
"""

import contextlib
import importlib.util
import os
import pathlib
import secrets
import time
from collections.abc import Iterator

from etils import epath

from research.core.errors import UserError

Path = pathlib.Path | epath.Path
CLIENTS = {"gs": ("gcsfs", "stillroom[gcs]"), "s3": ("s3fs", "s3fs")}  # scheme: (module, what to install)


def remote(path: str | os.PathLike) -> bool:
    """Whether `path` is an address in an object store."""
    return "://" in os.fspath(path)


def folder(path: str | os.PathLike) -> Path:
    """The path object for a file or folder, local or remote.

    Raises:
      UserError: an unknown scheme, or one whose client is not installed.
    """
    if not remote(path):
        return pathlib.Path(path)
    scheme = os.fspath(path).partition("://")[0]
    if scheme not in CLIENTS:
        raise UserError(f"{path}: no store of kind {scheme}://; there are {', '.join(f'{s}://' for s in CLIENTS)}")
    module, package = CLIENTS[scheme]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{path}: needs {module}: pip install '{package}'")
    return epath.Path(path)


def files(root: Path) -> list[Path]:
    """All files under `root`, sorted; [] where it is not there. Remotely, this asks once for every folder."""
    if isinstance(root, pathlib.Path):
        return sorted(p for p in root.rglob("*") if p.is_file())
    found: list[Path] = []
    for entry in root.iterdir() if root.exists() else ():
        found += files(entry) if entry.is_dir() else [entry]
    return sorted(found)


def write(file: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all, replacing an older one; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    if remote(file):
        file.write_bytes(data)
        return
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with _named(file):
            draft.write_bytes(data)
            os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors of writing say where, which those of a full disk do not by themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(file)
        raise


def create(file: Path, text: str) -> bool:
    """Writes a new file whole or not at all; False where it exists, so of two racing runs one wins (on a disk)."""
    if remote(file):
        if file.exists():
            return False
        file.write_text(text)
        return True
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    draft.write_text(text)
    try:
        os.link(draft, file)
    except FileExistsError:
        return False
    except OSError:  # file systems without hard links: still whole, only the race is not decided
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    return True


class Log:
    """A text file that grows by lines. On a disk each line is appended at once.

    Args:
      file: where it is; what it held is replaced by `lines`, whole or not at all.
      lines: its first lines, without line ends.
      every: in an object store, least seconds between two writings; `flush` writes what is left.
    """

    def __init__(self, file: Path, lines: list[str], every: float = 30.0):
        self._file, self._lines, self._every = file, list(lines), every
        self._remote, self._written, self._dirty = remote(file), time.monotonic(), False
        write(file, "".join(line + "\n" for line in lines))

    def add(self, line: str) -> None:
        """Appends one line."""
        if not self._remote:
            with _named(self._file), self._file.open("a") as stream:
                stream.write(line + "\n")
            return
        self._lines.append(line)
        self._dirty = True
        if time.monotonic() - self._written >= self._every:
            self.flush()

    def flush(self) -> None:
        """Brings an object store up to date; on a disk there is nothing to do."""
        if self._dirty:
            write(self._file, "".join(line + "\n" for line in self._lines))
            self._written, self._dirty = time.monotonic(), False
