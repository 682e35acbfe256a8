"""From any source of images to ArrayRecord shards: the work behind `python -m launch.shards`.

A shard is a fixed range of a split's examples, made whole under a draft's name and then renamed; a small file in the
folder `unfinished` marks it done. An interrupted conversion keeps those and makes the others again; `shards.json`,
without which nothing can be read, is written last. The bytes depend on the source and the options alone.
"""

import io
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from research.core.errors import UserError
from research.data import records, transforms
from research.data.base import BadExample, Source
from research.data.shards import (
    FORMAT,
    METADATA,
    UNFINISHED,
    VERSION,
    Shard,
    labels_name,
    shard_name,
)
from research.data.store import Store

PLAN = f"{UNFINISHED}/plan.json"
UNSPLIT = "all"  # the split of a source without splits


class Options(NamedTuple):
    """What is done to images.

    Attributes:
      size: pixels of the shorter side to which larger images are reduced; 0 leaves them.
      quality: of the JPEG in which images are stored anew, 1 to 100; 0 keeps those that are not reduced as they are.
      on_corrupt: `raise` or `skip` images that cannot be decoded.
    """

    size: int = 0
    quality: int = 0
    on_corrupt: str = "raise"


class Done(NamedTuple):
    """A finished shard: its number, bytes, labels, and the names and faults of images left out."""

    number: int
    bytes: int
    labels: list[int]
    skipped: list[str]


def prepare(image: bytes | np.ndarray, options: Options) -> bytes | np.ndarray:
    """The image as it is stored; raises BadExample where it cannot be decoded.

    Reduction is Pillow's bicubic, as the evaluation transform's, in RGB. Quality is 95 where none is given.
    """
    pixels = transforms.decode(image)
    height, width = pixels.shape[:2]
    scale = options.size / min(height, width)
    if not 0 < scale < 1 and not options.quality:
        return image
    picture = Image.fromarray(pixels)
    if 0 < scale < 1:
        picture = picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=options.quality or 95)
    return file.getvalue()


def bounds(examples: int, shards: int, number: int) -> tuple[int, int]:
    """First and past-the-last example of a shard; shards differ by one example at most."""
    return number * examples // shards, (number + 1) * examples // shards


def plan(sources: dict[str, Source], shards: int, options: Options) -> dict:
    """What a conversion is: equal plans make equal files, so that one may continue another's work."""
    return {
        "splits": {
            split: {"examples": len(source), "shards": min(shards, len(source)), "digest": _digest(source)}
            for split, source in sources.items()
        },
        "class_names": list(next(iter(sources.values())).class_names),
        **options._asdict(),
    }


def _digest(source: Source) -> int:
    """A number that differs between sources with other names or labels."""
    names = "\n".join(getattr(source, "paths", [source.name]))
    return zlib.crc32(b"" if source.labels is None else source.labels.tobytes(), zlib.crc32(names.encode()))


def begin(store: Store, wanted: dict) -> dict[str, list[Done]] | None:
    """Claims the folder for a plan and gives the shards that are done; None where the whole conversion is.

    Raises UserError where the folder holds another conversion, finished or not, or lies where shards cannot be read.
    """
    if not store.in_place:
        raise UserError(f"--to {store.root}: shards are written to a local folder or gs://; copy them on from there")
    try:
        finished = json.loads(store.read(METADATA)).get("made")
    except FileNotFoundError:
        finished = None
    except ValueError:
        raise UserError(f"--to {store.root}: its {METADATA} is damaged: choose another folder") from None
    if finished is not None:
        _same(store, finished, wanted, "holds data")
        _clean(store, wanted)
        return None
    try:
        _same(store, json.loads(store.read(PLAN)), wanted, "holds an unfinished conversion")
    except FileNotFoundError:
        if any(name.endswith(".array_record") for name in store.sizes()):
            raise UserError(f"--to {store.root}: holds shards of something else: choose another folder") from None
        store.write(PLAN, json.dumps(wanted).encode())
    if store.local:
        for left in pathlib.Path(store.root).glob(".*.partial"):
            left.unlink(missing_ok=True)
    sizes, marks = store.sizes(), Store(store.where(UNFINISHED), store.key).sizes()
    done: dict[str, list[Done]] = {}
    for split, part in wanted["splits"].items():
        done[split] = []
        for number in range(part["shards"]):
            name = shard_name(split, number, part["shards"])
            if _mark(name).rpartition("/")[2] in marks:
                found = Done(*json.loads(store.read(_mark(name))))
                if sizes.get(name) == found.bytes:
                    done[split].append(found)
    return done


def _same(store: Store, found: dict, wanted: dict, what: str) -> None:
    """Raises UserError naming the first thing in which two plans differ."""
    for key, value in wanted.items():
        if found.get(key) != value:
            change = "another source or number of shards" if key in ("splits", "class_names") else f"other {key}"
            values = f" ({found.get(key)}, now {value})" if isinstance(value, (int, str)) else ""
            raise UserError(f"--to {store.root}: {what} made with {change}{values}: choose another folder")


def write_shard(
    source: Source, store: Store, split: str, number: int, count: int, options: Options, tell: Callable[[int], None]
) -> Done:
    """Makes one shard and marks it done; `tell` hears of examples as they are written.

    Raises UserError for an image that cannot be decoded, where those are not skipped, and for a full disk.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    name = shard_name(split, number, count)
    folder = pathlib.Path(store.root if store.local else tempfile.gettempdir())
    draft = folder / f".{name}.{os.getpid()}.partial"
    labels, skipped = [], []
    try:
        # Images are compressed already. Group size 1 lets a single record be read.
        writer = ArrayRecordWriter(str(draft), "group_size:1,uncompressed")
        for index in range(*bounds(len(source), count, number)):
            try:
                example = source[index]
                image = prepare(example["image"], options)
            except BadExample as error:
                fault = f"{source.where(index)}: {error}"
                if options.on_corrupt == "raise":
                    raise UserError(f"{fault}; replace it, or pass --on-corrupt skip to leave it out") from None
                skipped.append(fault)
            else:
                writer.write(records.pack(records.Record(image, example["label"], index)))
                labels.append(int(example["label"]))
            tell(1)
        writer.close()
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        done = Done(number, draft.stat().st_size, labels, skipped)
        _open(draft, done, store)
        store.put(draft, name)
        store.write(_mark(name), json.dumps(done).encode())
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--to {store.root}: {name} cannot be written ({str(error).split(';')[0]}); "
            "finished shards are kept: make room, then run the same command again"
        ) from None
    finally:
        draft.unlink(missing_ok=True)
    return done


def _mark(name: str) -> str:
    return f"{UNFINISHED}/{name}.json"


def _open(file: pathlib.Path | str, done: Done, store: Store):
    """A reader of a shard; raises UserError where it does not hold what it should."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file), options="readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok() or reader.num_records() != len(done.labels):
        raise UserError(f"--to {store.root}: {file} was not written whole: remove it and run the same command again")
    return reader


def verify(source: Source, store: Store, split: str, done: list[Done], options: Options, samples: int = 3) -> None:
    """Reads counts and some images of every shard again and compares them with the source.

    Raises UserError naming the shard that differs; its mark is removed, so that the next run makes it again.
    """
    for shard in done:
        name = shard_name(split, shard.number, len(done))
        try:
            reader = _open(store.where(name), shard, store)
            count = len(shard.labels)
            for position in sorted({round(k * (count - 1) / max(samples - 1, 1)) for k in range(min(samples, count))}):
                record = records.unpack(reader.read([position])[0])
                expected = prepare(source[record.index]["image"], options)
                if record.label != shard.labels[position] or not np.array_equal(record.image, expected):
                    raise UserError(f"--to {store.root}: {name}[{position}] differs from {source.where(record.index)}")
        except (UserError, BadExample, RuntimeError) as error:
            store.remove([_mark(name)])
            raise UserError(f"{error}: run the same command again to make {name} anew") from None


def finish(store: Store, wanted: dict, done: dict[str, list[Done]]) -> dict[str, list[Shard]]:
    """Writes labels and `shards.json`, and removes the marks; raises UserError where a split kept no image."""
    splits = {}
    for split, shards in done.items():
        shards = sorted(shards)
        labels = np.array([label for shard in shards for label in shard.labels], np.int32)
        if not labels.size:
            raise UserError(f"--from: none of the images of {split} can be read ({shards[0].skipped[0]}, ...)")
        file = io.BytesIO()
        np.save(file, labels, allow_pickle=False)
        store.write(labels_name(split), file.getvalue())
        skipped = [fault for shard in shards for fault in shard.skipped]
        splits[split] = {"shards": [[len(shard.labels), shard.bytes] for shard in shards], "skipped": skipped}
    metadata = {"format": FORMAT, "version": VERSION, "class_names": wanted["class_names"], "splits": splits}
    store.write(METADATA, json.dumps(metadata | {"made": wanted}, indent=1).encode())
    _clean(store, wanted)
    return {
        split: [Shard(shard_name(split, d.number, len(part)), len(d.labels), d.bytes) for d in sorted(part)]
        for split, part in done.items()
    }


def _clean(store: Store, wanted: dict) -> None:
    """Removes the plan and the marks of a finished conversion."""
    if store.local:
        shutil.rmtree(store.where(UNFINISHED), ignore_errors=True)
    else:
        parts = {split: part["shards"] for split, part in wanted["splits"].items()}
        store.remove([PLAN, *(_mark(shard_name(split, k, n)) for split, n in parts.items() for k in range(n))])
