"""Converts images to ArrayRecord shards, the format for pods.

    python -m launch.shards --from folder imagenet/ --to imagenet-shards --shards 256 --size 256
    python -m launch.shards --from cifar.zip --to gs://bucket/cifar --shards 4

Train from them with data.kind=arrayrecord and data.path=<the folder>. Interrupted, the same command goes on where it
stopped: finished shards are kept, half-written ones made again. Images are decoded once to find damaged ones, and kept
byte for byte unless --size or --quality says otherwise. At the end every shard is sampled against the source.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time

from tqdm import tqdm

from research.core.config import suggest
from research.core.errors import UserError, cli
from research.data import convert, pipeline, sources
from research.data.base import Source
from research.data.convert import Done, Options
from research.data.store import Store

_mine: dict = {}  # what a worker process was given at its start


class Progress:
    """Lines (a rewritten one on a terminal) with examples, speed and time left."""

    def __init__(self, total: int, stream=None, every: float | None = None):
        self._total, self._stream = total, stream or sys.stderr
        self._live = self._stream.isatty()
        self._every = every if every is not None else (0.5 if self._live else 10.0)
        self._begin = self._last = time.monotonic()

    def show(self, count: int) -> None:
        """Tells of `count` finished examples, unless it just did."""
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        speed = count / (now - self._begin)
        left = tqdm.format_interval((self._total - count) / speed) if speed else "?"
        line = f"{count:,}/{self._total:,} images  {speed:.4g} images/s  ETA {left}"
        print(f"\r{line}  " if self._live else line, end="" if self._live else "\n", file=self._stream, flush=True)

    def close(self) -> None:
        if self._live:
            print(file=self._stream)


class Stopped(Exception):
    """Another shard failed, or the user interrupted: this one is given up."""


def _begin_worker(given: tuple, counter, stop) -> None:
    """Keeps what every shard needs, and makes the worker end with its parent, however that ends."""
    _mine.update(given=given, counter=counter, stop=stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _count(number: int) -> None:
    if _mine["stop"].is_set():
        raise Stopped()
    with _mine["counter"].get_lock():
        _mine["counter"].value += number


def _work(split: str, number: int, count: int) -> tuple[str, Done]:
    opened, store, options = _mine["given"]
    return split, convert.write_shard(opened[split], store, split, number, count, options, _count)


Left = list[tuple[str, int, int]]  # split, number of the shard, of how many


def write(opened: dict[str, Source], store: Store, left: Left, options: Options, workers: int) -> list[tuple]:
    """Makes the shards, in worker processes if more than one; gives (split, Done) as they are finished."""
    progress = Progress(sum(hi - lo for split, k, n in left for lo, hi in [convert.bounds(len(opened[split]), n, k)]))
    try:
        if workers > 1:
            return _write_in_processes((opened, store, options), left, workers, progress)
        seen = itertools.count(1)
        tell = lambda _: progress.show(next(seen))
        return [(split, convert.write_shard(opened[split], store, split, k, n, options, tell)) for split, k, n in left]
    finally:
        progress.close()


def _write_in_processes(given: tuple, left: Left, workers: int, progress: Progress) -> list[tuple]:
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    finished: list[tuple[str, Done]] = []
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (given, counter, stop))
    try:
        waiting = {pool.submit(_work, *shard) for shard in left}
        while waiting:
            ready, waiting = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
            finished += [future.result() for future in ready]
            progress.show(counter.value)
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError("--workers: a worker died, memory may have run out: run again with fewer") from None
    finally:
        stop.set()  # after a failure or an interrupt the others need not finish their shards
        pool.shutdown(cancel_futures=True)
    return finished


def open_sources(words: list[str], names: list[str]) -> dict[str, Source]:
    """The splits of the source that `--from` names, by their names."""
    if len(words) > 2:
        raise UserError(f"--from takes a kind and a path, or one of them, not {len(words)} words")
    kind, path = words if len(words) == 2 else (words[0], None) if words[0] in sources.KINDS else (None, words[0])
    if kind is not None and kind not in sources.KINDS:
        raise UserError(f"--from: no kind {kind!r}{suggest(kind, sources.KINDS)}")
    if kind == "text":
        raise UserError("--from text: shards hold images; runs read text from its files: data.kind=text, data.path=…")
    names = names or sources.splits(kind, path)
    if not names:
        return {convert.UNSPLIT: sources.source(kind, path)}
    opened = {name: sources.source(kind, path, name) for name in names}
    if len({source.class_names for source in opened.values()}) > 1:
        raise UserError("--splits: they have different classes; convert each into a folder of its own")
    return opened


def run(opened: dict[str, Source], store: Store, shards: int, options: Options, workers: int) -> dict:
    """Converts, verifies and finishes; gives the shards of each split, None where all was done before."""
    wanted = convert.plan(opened, shards, options)
    done = convert.begin(store, wanted)
    if done is None:
        return None
    parts = {split: part["shards"] for split, part in wanted["splits"].items()}
    have = {(split, shard.number) for split, found in done.items() for shard in found}
    left = [(split, k, n) for split, n in parts.items() for k in range(n) if (split, k) not in have]
    if have:
        print(f"{len(have)} shards were finished before, {len(left)} are left", file=sys.stderr)
    for split, shard in write(opened, store, left, options, min(workers, len(left))) if left else ():
        done[split].append(shard)
    for split, found in done.items():
        convert.verify(opened[split], store, split, sorted(found), options)
    return convert.finish(store, wanted, done)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ", ".join(sources.KINDS)
    found.add_argument("--from", dest="words", nargs="+", required=True, metavar="WORD", help=f"[KIND] PATH; {kinds}")
    found.add_argument("--to", required=True, help="folder to write, local or gs://")
    found.add_argument("--splits", default="", help="the splits to convert, with commas between (all)")
    found.add_argument("--shards", type=int, default=16, help="shards of each split (16); 100 MB to 1 GB each is good")
    found.add_argument("--size", type=int, default=0, help="reduce the shorter side to so many pixels (0: as it is)")
    found.add_argument("--quality", type=int, default=0, help="store as JPEG of this quality (0: keep; 95 if reduced)")
    found.add_argument("--on-corrupt", default="raise", choices=pipeline.ON_CORRUPT, help="damaged images (raise)")
    found.add_argument("--workers", type=int, default=pipeline.cores(), help="processes (one for each core)")
    return found


@cli
def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    for name, low, high in (("shards", 1, 99999), ("size", 0, 1 << 16), ("quality", 0, 100), ("workers", 1, 1024)):
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name} {getattr(options, name)}: must be {low} to {high}")
    opened = open_sources(options.words, [name for name in options.splits.split(",") if name])
    store = Store(options.to, key="--to")
    made = run(
        opened, store, options.shards, Options(options.size, options.quality, options.on_corrupt), options.workers
    )
    if made is None:
        print(f"{options.to} holds this data already: nothing to do")
        return 0
    for split, shards in made.items():
        count, size = sum(shard.examples for shard in shards), sum(shard.bytes for shard in shards)
        left_out = len(opened[split]) - count
        note = f", {left_out:,} damaged ones left out" if left_out else ""
        print(f"{split}: {count:,} images in {len(shards)} shards, {size / 1e6:,.1f} MB{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
