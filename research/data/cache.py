"""A local, bounded copy of shards that lie in an object store, made ahead of need.

Training reads in a random order over all shards, so throwing copies away to make room for others would fetch every
shard again for almost every example. The cache therefore keeps the first shards that fit and never evicts; the others
are read in place, example by example, where the store allows it.
"""

import contextlib
import fcntl
import logging
import pathlib
import shutil
import threading
import zlib
from collections.abc import Iterator

from research.core.errors import UserError
from research.data.store import Store

LOG = logging.getLogger(__name__)

COPIERS = 4  # threads that copy ahead
_SPARE = 1 << 30  # bytes of the disk that are left free


class Cache:
    """Copies of a store's files in a folder of this machine; processes may share the folder. May be pickled.

    Args:
      store: where the files are.
      sizes: bytes of each file, in the order in which they are copied.
      folder: `data.options.cache`; files go to a subfolder named after the data, so that old copies of data that were
        made anew are not taken for theirs.
      limit: most bytes to keep, 0 for all files.
      version: bytes that change whenever the data do.
    Raises:
      UserError: the store cannot be read in place, and limit or disk is too small for all files.
    """

    def __init__(self, store: Store, sizes: dict[str, int], folder: str, limit: int, version: bytes):
        digest = zlib.crc32(version, zlib.crc32(store.root.encode()))
        self._store, self._sizes, self._limit = store, sizes, limit
        self.folder = pathlib.Path(folder).expanduser() / f"{store.root.rpartition('/')[2]}-{digest:08x}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = self._fitting()
        self._fresh()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_started")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._fresh()

    def _fresh(self) -> None:
        self._lock, self._started = threading.Lock(), False

    def _fitting(self) -> frozenset[str]:
        """The names that are kept: as many of the first as limit and disk have room for."""
        there = {name for name in self._sizes if self.have(name)}
        free = shutil.disk_usage(self.folder).free - _SPARE
        total, needed, kept = 0, 0, set()
        for name, size in self._sizes.items():
            total += size
            needed += 0 if name in there else size
            if (self._limit and total > self._limit) or needed > max(free, 0):
                break
            kept.add(name)
        if len(kept) == len(self._sizes):
            return frozenset(kept)
        whole, disk = sum(self._sizes.values()) / 1e9, free / 1e9
        limit = f"data.options.cache_gb allows {self._limit / 1e9:.3g} GB" if self._limit else "no limit is set"
        short = f"the split has {whole:.3g} GB, {limit}, the disk has room for {disk:.3g} GB"
        if not self._store.in_place:
            root = self._store.root
            raise UserError(f"data.options.cache: {short}; {root} cannot be read in place: make room for all of it")
        LOG.warning("data.options.cache: %s; the shards beyond are read in place", short)
        return frozenset(kept)

    def have(self, name: str) -> pathlib.Path | None:
        """The copy of a file, if it is there."""
        copy = self.folder / name
        with contextlib.suppress(OSError):
            if copy.stat().st_size == self._sizes[name]:
                return copy
        return None

    def fetch(self, name: str, wait: bool = True) -> pathlib.Path | None:
        """Copies a file unless it is there; one process does, others wait for it (or go on with None).

        Raises UserError where copying fails or the copy has another size than the file should have.
        """
        with _locked(self.folder / f".{name}.lock", wait) as mine:
            if not mine or (found := self.have(name)):
                return found if mine else None
            try:
                self._store.get(name, self.folder / name)
            except Exception as error:
                line = str(error).strip().split("\n")[0]
                what = f"{self._store.where(name)} not copied to {self.folder}: {line}"
                raise UserError(f"data.options.cache: {what}") from None
            found = self.have(name)
            if not found:
                (self.folder / name).unlink(missing_ok=True)
                what = f"{self._store.where(name)} has not {self._sizes[name]} bytes"
                raise UserError(f"data.path: {what}: copy it there again")
            return found

    def ahead(self) -> None:
        """Starts copying everything that is kept, in the background; later calls do nothing."""
        with self._lock:
            if self._started:
                return
            self._started = True
        left = iter([name for name in self._sizes if name in self.names])
        for _ in range(COPIERS):
            threading.Thread(target=self._copy, args=(left,), daemon=True, name="shards").start()

    def _copy(self, left: Iterator[str]) -> None:
        while True:
            with self._lock:
                name = next(left, None)
            if name is None:
                return
            try:
                self.fetch(name, wait=False)
            except UserError as error:
                LOG.warning("%s; copying ahead ends", error)
                return


@contextlib.contextmanager
def _locked(file: pathlib.Path, wait: bool) -> Iterator[bool]:
    """Holds a lock between processes, which ends with its process; gives whether it is held."""
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
