"""Small shards for tests."""

import pathlib

import numpy as np

from research.data import convert
from research.data.sources import Arrays
from research.data.store import Store


def numbered(count: int, classes: int = 5) -> Arrays:
    """A source whose image i is filled with i."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 8, 8))
    return Arrays(images, np.arange(count) % classes, num_classes=classes)


PLAIN = convert.Options()


def converted(folder: pathlib.Path, shards: int = 3, options: convert.Options = PLAIN, **splits) -> str:
    """Converts sources to shards in a folder, in this process; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    store, wanted = Store(folder), convert.plan(splits, shards, options)
    done = convert.begin(store, wanted)
    for split, part in wanted["splits"].items():
        ready = {shard.number for shard in done[split]}
        for number in set(range(part["shards"])) - ready:
            made = convert.write_shard(splits[split], store, split, number, part["shards"], options, lambda _: None)
            done[split].append(made)
        convert.verify(splits[split], store, split, sorted(done[split]), options)
    convert.finish(store, wanted, done)
    return str(folder)
