"""Stored labels of a teacher in ArrayRecord shards, one record an example: the files of `python -m launch.labels`.

A folder, local or `gs://`, holds `labels-00000-of-00016.array_record`, ... and `labels.json`:

    {"format": "stillroom-labels", "version": 1, "made": {what was labelled, how, by whom},
     "shards": [[examples, bytes], ...]}

Record i is that of example i of the data set. It is little-endian and has no padding:

    bytes 0-1    b"SL"
    bytes 2-3    uint16  number of views, 0 where the image cannot be read
    bytes 4-11   int64   index of the example
    then         for each view its labels, as `layout` says
    then         for each view a uint16, the length of its description
    then         the descriptions, see research.data.views (none where labels are maps of the whole image)

Labels are log-probabilities, not probabilities: in float32 every logit comes back as log p + lse, however small p is.
"""

import json
import os
import pathlib
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from research.core.errors import UserError
from research.data.convert import bounds
from research.data.shards import Shard, shard_name
from research.data.store import Store

METADATA, UNFINISHED = "labels.json", "unfinished"
PLAN = f"{UNFINISHED}/plan.json"
FORMAT, VERSION = "stillroom-labels", 1
CROPS, MAPS = FORMS = ("crops", "maps")
DTYPES = ("float32", "float16")
_HEAD = struct.Struct("<2sHq")


def layout(made: dict) -> np.dtype:
    """The type of one view's labels.

    Of crops: `lse`, the log-sum-exp of all logits; `logp` (k,), the largest log-probabilities by ascending class; and
    `classes` (k,), left out where all are kept. Of maps: `scores` (h, w, k) and `classes` (h, w, k).
    """
    value = np.dtype(made["dtype"]).newbyteorder("<")
    number = np.dtype("<u2" if made["data"]["num_classes"] <= 1 << 16 else "<u4")
    if made["form"] == MAPS:
        shape = (*made["map"], made["top"])
        return np.dtype([("scores", value, shape), ("classes", number, shape)])
    fields = [("lse", "<f4"), ("logp", value, (made["top"],))]
    if made["top"] < made["data"]["num_classes"]:
        fields.append(("classes", number, (made["top"],)))
    return np.dtype(fields)


def pack(index: int, labels: np.ndarray, views: list[bytes]) -> bytes:
    """The record of an example: labels (views,) of a `layout`, and a description of each view."""
    lengths = np.array([len(view) for view in views], "<u2")
    return b"".join([_HEAD.pack(b"SL", len(labels), index), labels.tobytes(), lengths.tobytes(), *views])


class Record(NamedTuple):
    """Labels (views,) of a `layout`, and as many descriptions."""

    index: int
    labels: np.ndarray
    views: list[bytes]


def unpack(data: bytes, kind: np.dtype) -> Record:
    """The record in `data`; raises ValueError for bytes of another format or length."""
    if len(data) < _HEAD.size or data[:2] != b"SL":
        raise ValueError("not a record of launch.labels")
    _, count, index = _HEAD.unpack_from(data)
    place = _HEAD.size + count * (kind.itemsize + 2)
    if len(data) < place:
        raise ValueError(f"a record of {len(data)} bytes, too short for {count} views")
    labels = np.frombuffer(data, kind, count, _HEAD.size)
    ends = place + np.cumsum(np.frombuffer(data, "<u2", count, place - 2 * count), dtype=np.int64)
    if len(data) != (ends[-1] if count else place):
        raise ValueError(f"a record of {len(data)} bytes, not of the length it tells")
    return Record(index, labels, [data[start:end] for start, end in zip([place, *ends[:-1]], ends, strict=False)])


class Done(NamedTuple):
    """A finished shard: number, examples, bytes."""

    number: int
    examples: int
    bytes: int


def name_of(number: int, made: dict) -> str:
    return shard_name("labels", number, made["shards"])


def _mark(number: int, made: dict) -> str:
    return f"{name_of(number, made)}.json"


def begin(store: Store, made: dict) -> list[Done] | None:
    """Claims the folder for labels so made, and gives the shards that are done; None where all is.

    Raises UserError where the folder holds, or has begun to hold, labels made otherwise; it names the difference.
    """
    if not store.in_place:
        raise UserError(f"--output {store.root}: labels are written to a local folder or gs://; copy them from there")
    names = store.sizes()
    if METADATA in names:
        _same(store, read_metadata(store, "--output")[0], made, "holds labels")
        return None
    try:
        _same(store, json.loads(store.read(PLAN)), made, "holds unfinished labels")
    except FileNotFoundError:
        if any(name.endswith(".array_record") for name in names):
            raise UserError(f"--output {store.root}: holds shards of something else: choose another folder") from None
        store.write(PLAN, json.dumps(made).encode())
    return finished(store, made)


def _same(store: Store, found: dict, made: dict, what: str) -> None:
    for key, value in made.items():
        if found.get(key) != value:
            change = f"other {key} ({json.dumps(found.get(key))}, now {json.dumps(value)})"
            raise UserError(f"--output {store.root}: {what} made with {change}: choose another folder")


def finished(store: Store, made: dict) -> list[Done]:
    """The shards that are marked as done and have their size."""
    sizes, marks = store.sizes(), Store(store.where(UNFINISHED), store.key).sizes()
    done = []
    for number in range(made["shards"]):
        if _mark(number, made) in marks:
            found = Done(*json.loads(store.read(f"{UNFINISHED}/{_mark(number, made)}")))
            if sizes.get(name_of(number, made)) == found.bytes:
                done.append(found)
    return done


def write_shard(store: Store, made: dict, number: int, found: Callable[[int, int], Iterable[bytes]]) -> Done:
    """Makes shard `number` of the records that `found(first, past the last)` gives, and marks it done.

    Raises UserError for a disk that is full.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    name = name_of(number, made)
    folder = pathlib.Path(store.root if store.local else tempfile.gettempdir())
    draft = folder / f".{name}.{os.getpid()}.partial"
    try:
        for left in folder.glob(f".{name}.*.partial"):
            left.unlink(missing_ok=True)
        writer = ArrayRecordWriter(str(draft), "group_size:1,uncompressed")
        count = 0
        for record in found(*bounds(made["data"]["examples"], made["shards"], number)):
            writer.write(record)
            count += 1
        writer.close()
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        done = Done(number, count, draft.stat().st_size)
        store.put(draft, name)
        store.write(f"{UNFINISHED}/{_mark(number, made)}", json.dumps(done).encode())
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--output {store.root}: {name} cannot be written ({str(error).split(';')[0]}); finished shards are kept: "
            "make room, then run the same command again"
        ) from None
    finally:
        draft.unlink(missing_ok=True)
    return done


def finish(store: Store, made: dict, done: list[Done]) -> None:
    """Writes `labels.json`, without which nothing is read, and removes the marks."""
    shards = [[shard.examples, shard.bytes] for shard in sorted(done)]
    metadata = {"format": FORMAT, "version": VERSION, "made": made, "shards": shards}
    store.write(METADATA, json.dumps(metadata, indent=1).encode())
    if store.local:
        shutil.rmtree(store.where(UNFINISHED), ignore_errors=True)
    else:
        store.remove([PLAN, *(f"{UNFINISHED}/{_mark(number, made)}" for number in range(made["shards"]))])


def read_metadata(store: Store, key: str) -> tuple[dict, list[Shard]]:
    """(how the labels were made, their shards).

    Raises:
      FileNotFoundError: no `labels.json`; the message tells unfinished labels from none.
      UserError: it is damaged, or of another version.
    """
    try:
        text = store.read(METADATA)
    except (FileNotFoundError, NotADirectoryError):
        begun = store.local and pathlib.Path(store.where(PLAN)).exists()
        why = "its labels are unfinished: run launch.labels again" if begun else "set it to a folder of launch.labels"
        raise FileNotFoundError(f"{key}: no {METADATA} in {store.root}; {why}") from None
    try:
        found = json.loads(text)
        if found.get("format") != FORMAT:
            raise ValueError("of another program")
        if found["version"] > VERSION:
            raise ValueError(f"version {found['version']}, this program reads up to {VERSION}")
        made = found["made"]
        layout(made)
        return made, [Shard(name_of(k, made), *map(int, pair)) for k, pair in enumerate(found["shards"])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{key}: {store.where(METADATA)} is not readable ({reason}): copy it again") from None


class Labels:
    """The labels of a folder, read by the index of an example. May be pickled, and shared by threads.

    Raises:
      FileNotFoundError, UserError: as `read_metadata`; a shard is missing or has another size.
    """

    def __init__(self, path: str, key: str = "teacher.labels"):
        self._store, self._key = Store(path, key), key
        self.made, self._shards = read_metadata(self._store, key)
        self._layout = layout(self.made)
        self._ends = np.cumsum([shard.examples for shard in self._shards])
        sizes = self._store.sizes()
        for shard in self._shards:
            if sizes.get(shard.name) != shard.bytes:
                has = f"has {sizes[shard.name]} of {shard.bytes} bytes" if shard.name in sizes else "is missing"
                raise UserError(f"{key}: {self._store.where(shard.name)} {has}: copy it again")
        self._fresh()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._fresh()

    def _fresh(self) -> None:
        self._readers: dict = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        """The record of example `index`; raises UserError where it is damaged, IndexError past the end."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self._store.root} has labels of {len(self)} examples, no number {index}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        position = int(index - self._ends[shard] + self._shards[shard].examples)
        try:
            found = unpack(self._reader(shard).read([position])[0], self._layout)
            if found.index != index:
                raise ValueError(f"the record of example {found.index}")
        except (RuntimeError, ValueError, IndexError) as error:
            where = f"{self._store.where(self._shards[shard].name)}[{position}]"
            line = str(error).split("\n")[0].split(";")[0]
            raise UserError(f"{self._key}: {where} is damaged ({line}): copy it again") from None
        return found

    def _reader(self, shard: int):
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if shard not in self._readers:
                file = self._store.where(self._shards[shard].name)
                options = "readahead_buffer_size:0,max_parallelism:0"
                self._readers[shard] = ArrayRecordReader(file, options=options, file_reader_buffer_size=1 << 15)
            return self._readers[shard]
