"""Labelled images in ArrayRecord shards, read by index: the format for pods.

A folder, local or `gs://`, holds for each split `train-00000-of-00064.array_record`, ..., and `train-labels.npy`
(int32, one for each example in order); `shards.json` says what there is:

    {"format": "stillroom-shards", "version": 1, "class_names": [...],
     "splits": {"train": {"shards": [[examples, bytes], ...], "skipped": [...]}}, "made": {...}}

Example i of a split is the i-th record counted through its shards; research.data.records describes a record. Splits
may also lie in folders of their own (`train/shards.json`). `python -m launch.shards` writes all this.

A host reads the records that its rows of a batch need, and no others. See research/data/README.md for object stores.
"""

import io
import json
import threading
from typing import NamedTuple

import numpy as np

from research.core.errors import UserError
from research.data import records
from research.data.base import BadExample, Source, choose_split
from research.data.cache import Cache
from research.data.store import Store

METADATA = "shards.json"
UNFINISHED = "unfinished"  # folder of a conversion that has not ended
FORMAT, VERSION = "stillroom-shards", 1
_DAMAGE = ("Corrupted", "Invalid Riegeli", "Invalid ArrayRecord", "Truncated")


class Shard(NamedTuple):
    """One file: its name, records and bytes."""

    name: str
    examples: int
    bytes: int


class Metadata(NamedTuple):
    """What `shards.json` says: classes, the shards of each split, and the file's own bytes."""

    class_names: list[str]
    splits: dict[str, list[Shard]]
    text: bytes


def shard_name(split: str, number: int, count: int) -> str:
    return f"{split}-{number:05d}-of-{count:05d}.array_record"


def labels_name(split: str) -> str:
    return f"{split}-labels.npy"


def read_metadata(store: Store) -> Metadata:
    """Reads and checks `shards.json`.

    Raises:
      FileNotFoundError: it is not there; the message tells an unfinished conversion and foreign shards from nothing.
      UserError: it is damaged or of another version.
    """
    try:
        text = store.read(METADATA)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(_missing(store)) from None
    try:
        found = json.loads(text)
        if found.get("format") != FORMAT:
            raise ValueError("of another program")
        if found["version"] > VERSION:
            raise ValueError(f"version {found['version']}, this program reads up to {VERSION}")
        splits = {split: _shards(split, said["shards"]) for split, said in found["splits"].items()}
        return Metadata([str(name) for name in found["class_names"]], splits, text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"data.path: {store.where(METADATA)} is not readable ({reason}): copy it again") from None


def _shards(split: str, sizes: list) -> list[Shard]:
    return [Shard(shard_name(split, k, len(sizes)), *map(int, pair)) for k, pair in enumerate(sizes)]


def _missing(store: Store) -> str:
    names = store.sizes()
    if not names and store.local:
        unfinished = Store(store.where(UNFINISHED)).sizes()
        if unfinished:
            return f"data.path: the conversion in {store.root} has not ended: run the same launch.shards command again"
    if any(name.endswith(".array_record") for name in names):
        return (
            f"data.path: {store.root} has shards but no {METADATA}: a conversion that has not ended (run launch.shards "
            "again), a copy without it, or shards of another program (kind tfds reads those of TensorFlow Datasets)"
        )
    return f"data.path: no {METADATA} in {store.root}; set data.path to a folder that launch.shards wrote"


class Shards(Source):
    """A split of a folder of shards; see `open_shards`. May be pickled: readers are opened where they are used."""

    def __init__(self, store: Store, split: str, metadata: Metadata, cache: Cache | None):
        self._store, self._cache = store, cache
        self._shards = metadata.splits[split]
        self._ends = np.cumsum([shard.examples for shard in self._shards])
        super().__init__(store.where(split), metadata.class_names, _labels(store, split, metadata, int(self._ends[-1])))
        if not store.local and not (cache and len(cache.names) == len(self._shards)):
            self.concurrency = 16  # a read from an object store takes tens of milliseconds
        self._fresh()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_readers", "_remote", "_locks")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._fresh()

    def _fresh(self) -> None:
        self._readers: dict = {}  # of local files, by shard
        self._remote: dict = {}  # of shards read in place in a store
        self._locks = [threading.Lock() for _ in self._shards]

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, record in it) of an example."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(index - self._ends[shard] + self._shards[shard].examples)

    def where(self, index: int) -> str:
        shard, position = self._place(index)
        return f"{self._store.where(self._shards[shard].name)}[{position}]"

    def image(self, index: int) -> bytes | np.ndarray:
        shard, position = self._place(index)
        try:
            [data] = self._reader(shard).read([position])
        except RuntimeError as error:
            line = str(error).split("\n")[0]
            if any(word in line for word in _DAMAGE):
                raise BadExample(f"the shard is damaged at this record ({line.split(';')[0]}): copy it again") from None
            raise UserError(f"data.path: {self.where(index)} cannot be read ({line})") from None
        record = records.unpack(data)
        if record.label != self.labels[index]:
            raise UserError(f"data.path: {self.where(index)} has another label than the labels file: copy both again")
        return record.image

    def _reader(self, shard: int):
        if (found := self._readers.get(shard)) is not None:
            return found
        with self._locks[shard]:
            if shard in self._readers:
                return self._readers[shard]
            name = self._shards[shard].name
            if self._store.local:
                file = self._store.where(name)
            else:
                file = self._copy_of(name)
            if file:
                return self._readers.setdefault(shard, _open(file, self._shards[shard]))
            if shard not in self._remote:
                self._remote[shard] = _open(self._store.where(name), self._shards[shard])
            return self._remote[shard]

    def _copy_of(self, name: str) -> str | None:
        """The cached copy of a shard, made first where the shard cannot be read in place; None without one."""
        if not self._cache:
            return None
        self._cache.ahead()
        if name not in self._cache.names:
            return None
        copy = self._cache.have(name) if self._store.in_place else self._cache.fetch(name)
        return str(copy) if copy else None


def _open(file: str, shard: Shard):
    """A reader of single records that threads may share; raises UserError for a damaged file or another count."""
    from array_record.python.array_record_module import ArrayRecordReader

    single = "readahead_buffer_size:0,max_parallelism:0"  # what suits reading one record at a time
    reader = ArrayRecordReader(file, options=single, file_reader_buffer_size=1 << 15)
    if not reader.ok():
        raise UserError(f"data.path: {file} cannot be read ({_reason(reader)}): copy it again, or raise `ulimit -n`")
    if reader.num_records() != shard.examples:
        raise UserError(
            f"data.path: {file} holds {reader.num_records()} records, {METADATA} says {shard.examples}: copy both again"
        )
    return reader


def _reason(reader) -> str:
    try:
        reader.read([0])
    except (RuntimeError, IndexError) as error:
        return str(error).split("\n")[0]
    return "damaged"


def _labels(store: Store, split: str, metadata: Metadata, count: int) -> np.ndarray:
    name = store.where(labels_name(split))
    try:
        labels = np.load(io.BytesIO(store.read(labels_name(split))), allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"data.path: {name} is missing: copy it again") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"data.path: {name} is damaged ({str(error).splitlines()[0]}): copy it again") from None
    if labels.shape != (count,) or labels.dtype != np.int32:
        has = f"{labels.shape} {labels.dtype}"
        raise UserError(f"data.path: {name} holds {has}, the shards {count} examples: copy both again")
    if count and not 0 <= labels.min() <= labels.max() < len(metadata.class_names):
        raise UserError(f"data.path: {name} has labels outside the {len(metadata.class_names)} classes: copy it again")
    return labels


def open_shards(path: str | None = None, split: str | None = None, cache: str = "", cache_gb: float = 0.0) -> Shards:
    """Opens a split of a folder of shards.

    Args:
      path: the folder: a local path, `gs://...`, or another address that fsspec knows.
      split: one of its splits; may be left out where there is one only.
      cache: local folder to which shards of an object store are copied ahead of need; empty reads `gs://` in place.
      cache_gb: most gigabytes that this split may take there; 0 keeps all of it.
    Raises:
      FileNotFoundError: no `shards.json`, or no labels.
      UserError: a shard is missing or has another size; no such split; damaged metadata; no cache where it is needed.
    """
    if not path:
        raise UserError("data.path: a source of kind 'arrayrecord' needs one, the folder that launch.shards wrote")
    store = Store(path)
    if split and store.local and METADATA not in store.sizes() and METADATA in Store(store.where(split)).sizes():
        store = Store(store.where(split))
    metadata = read_metadata(store)
    if not split and len(metadata.splits) == 1:
        [split] = metadata.splits
    split = choose_split(split, list(metadata.splits), path)
    _check_files(store, split, metadata.splits[split])
    if not store.in_place and not cache:
        raise UserError(f"data.options.cache: {path} cannot be read in place; set it to a folder on a local disk")
    kept = None
    if cache and not store.local:
        sizes = {shard.name: shard.bytes for shard in metadata.splits[split]}
        kept = Cache(store, sizes, cache, int(cache_gb * 1e9), metadata.text)
    return Shards(store, split, metadata, kept)


def _check_files(store: Store, split: str, shards: list[Shard]) -> None:
    sizes = store.sizes()
    missing = [shard.name for shard in shards if shard.name not in sizes]
    if missing:
        names = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        lacks = f"lacks {len(missing)} of the {len(shards)} shards of {split} ({names})"
        raise UserError(f"data.path: {store.root} {lacks}: copy them again")
    for shard in shards:
        if sizes[shard.name] != shard.bytes:
            raise UserError(
                f"data.path: {store.where(shard.name)} has {sizes[shard.name]} of {shard.bytes} bytes: copy it again"
            )
