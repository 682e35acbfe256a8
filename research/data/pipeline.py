"""Deterministic batches, addressed by a step number.

Step s of a run is the same batch in the same order for any number of processes, threads or workers: every example has a
global position (step * batch_size + row), which gives its index by a seeded permutation and its augmentation by a
Generator made from (seed, position). Resuming is starting at a later step; nothing else has to be remembered.
"""

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

import grain.python as grain
import numpy as np
from absl import flags

from research.core.errors import UserError
from research.data.base import BadExample, Source
from research.data.order import Order, steps_per_epoch

ON_CORRUPT = ("raise", "skip")
PART = 16  # most examples a thread reads at a time
_FOREVER = 2**40  # steps of an endless run


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Gives transformed example `index`, or the next good one where it is bad and may be skipped."""

    source: Source
    transform: Callable[[dict, np.random.Generator], dict]
    on_corrupt: str

    def __call__(self, index: int, key: tuple[int, int]) -> tuple[dict, bool]:
        """(the example, whether it is the one asked for); raises UserError naming a bad one that may not be skipped."""
        for tried in range(len(self.source)):
            now = (index + tried) % len(self.source)
            try:
                return self.transform(self.source[now], np.random.default_rng(key)), tried == 0
            except BadExample as error:
                name = f"{self.source.where(now)}: {error}"
                if self.on_corrupt == "raise":
                    raise UserError(f"{name}; replace it, or set data.on_corrupt=skip to use the next one") from None
                _warn(f"{name}; the next one is used")
        raise UserError(f"data.path: none of the {len(self.source)} examples of {self.source.name} can be read")


@dataclasses.dataclass(frozen=True)
class _TrainRow:
    """Position of one process -> its training example."""

    read: _Reader
    order: Order
    start: int
    rows: int
    first_row: int

    def __call__(self, position: int) -> dict:
        step, row = divmod(position, self.rows)
        step, row = step + self.start, row + self.first_row
        key = (self.order.seed, step * self.order.batch_size + row)
        return _with_mask(self.read(self.order(step, row), key)[0], True)


@dataclasses.dataclass(frozen=True)
class _EvalRow:
    """Position of one process -> its example in the data's own order; past the end, copies with mask 0."""

    read: _Reader
    batch_size: int
    rows: int
    first_row: int

    def __call__(self, position: int) -> dict:
        step, row = divmod(position, self.rows)
        index, length = step * self.batch_size + row + self.first_row, len(self.read.source)
        example, asked = self.read(index % length, (0, index))
        return _with_mask(example, asked and index < length)


class Batches(Iterator[dict[str, np.ndarray]]):
    """An iterator of batches that can be closed; closing ends threads and worker processes."""

    def __init__(self, dataset: grain.IterDataset):
        self._batches = iter(dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._batches)
        except StopIteration:
            raise
        except UserError as error:
            self.close()
            raise UserError(str(error)) from None
        except RuntimeError as error:
            self.close()
            if "Worker process was terminated" not in str(error):
                raise
            raise RuntimeError(
                f"a data worker died ({str(error).split('.')[0]}): memory or /dev/shm may have run out; lower "
                "data.workers, or decode in threads with data.workers=0"
            ) from None

    def close(self) -> None:
        """Stops reading ahead. No batch can be taken afterwards."""
        self._batches.close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def train_batches(
    source: Source,
    transform: Callable[[dict, np.random.Generator], dict],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    repeats: int = 1,
    group: int | None = None,
    workers: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
    on_corrupt: str = "raise",
) -> Batches:
    """Endless training batches of one process.

    Args:
      source: the examples.
      transform: `(example, rng) -> dict of arrays`, see research.data.transforms.
      batch_size: examples a step over all processes; process p gets rows p * b to (p + 1) * b of each.
      seed: of order and augmentation.
      start_step: the first step given; batch s is the same wherever the run was started.
      process_index, process_count: this process among those that share the batch.
      repeats: copies of each image, differently augmented, within a step (repeated augmentation, arXiv 1902.05509).
      group: rows among which copies of one image should not meet: what one GPU of the published run saw.
      workers: decoding processes; 0 decodes in threads. The batches are the same.
      threads: decoding threads where there are no workers; None: one for each core this process may use, more where
        the source waits for a network.
      prefetch: batches read ahead, by each worker or by all threads together.
      on_corrupt: `raise` ends with an error naming the example; `skip` logs it and takes the next good one.
    Returns:
      An iterator of {'image': uint8 (b, H, W, 3), 'label': int32 (b,), 'index': int32 (b,), 'mask': float32 ones (b,)}.
    Raises:
      UserError: empty source, a batch that does not divide, or (from next) an example that cannot be read.
      RuntimeError: (from next) a worker process died.
    """
    rows = _rows(source, batch_size, process_index, process_count)
    if group and batch_size % group:
        raise UserError(f"batch_size: {batch_size} does not divide into groups of {group}; make it a multiple")
    if repeats < 1:
        raise UserError(f"data.repeats: {repeats}; an image is used at least once")
    order = Order(len(source), batch_size, seed, steps_per_epoch(source, batch_size, repeats), repeats, group)
    read = _Reader(source, transform, _one_of_on_corrupt(on_corrupt))
    row = _TrainRow(read, order, start_step, rows, process_index * rows)
    return _batches(row, _FOREVER * rows, rows, workers, threads or cores() * source.concurrency, prefetch)


def eval_batches(
    source: Source,
    transform: Callable[[dict, np.random.Generator | None], dict],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int | None = None,
    prefetch: int = 2,
    on_corrupt: str = "raise",
) -> Batches:
    """One pass over the source in its own order: every example exactly once over all processes.

    All processes get equally many batches. Rows past the end are copies of early examples with mask 0; so are the rows
    of examples that cannot be read, under `on_corrupt='skip'`. Arguments, batches and errors as in `train_batches`.
    """
    rows = _rows(source, batch_size, process_index, process_count)
    read = _Reader(source, transform, _one_of_on_corrupt(on_corrupt))
    row = _EvalRow(read, batch_size, rows, process_index * rows)
    steps = -(-len(source) // batch_size)
    return _batches(row, steps * rows, rows, workers, threads or cores() * source.concurrency, prefetch)


def _batches(row: Callable[[int], dict], count: int, rows: int, workers: int, threads: int, prefetch: int) -> Batches:
    examples = grain.MapDataset.range(count).map(row)
    if workers == 0:
        # Threads work on parts of a batch, so that the consumer has few pieces to put together.
        part = max(size for size in range(1, min(rows, PART) + 1) if rows % size == 0)
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, prefetch * rows // part))
        return Batches(examples.batch(part).to_iter_dataset(ahead).batch(rows // part, batch_fn=_join))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's process code reads absl flags, and programs without absl never parse any
    # Whole batches go to the workers in turn, and come back in turn: the order does not depend on who is fast.
    batches = examples.batch(rows).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
    return Batches(batches.mp_prefetch(options, worker_init_fn=_begin_worker))


def _join(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _begin_worker(index: int, count: int) -> None:
    """Makes a worker live exactly as long as its parent.

    A cluster's warning signals reach every process of a job: the parent saves and ends then, and needs its workers
    until it does. A parent that is killed outright cannot stop them, so each one watches for that.
    """
    del index, count
    for warning in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(warning, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _rows(source: Source, batch_size: int, process_index: int, process_count: int) -> int:
    """Rows of each process in a batch."""
    if len(source) == 0:
        raise UserError(f"data.path: {source.name} holds no examples; point data.path at a folder or file with images")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size: {batch_size} does not divide over {process_count} processes; make it a multiple")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not below process_count {process_count}")
    return batch_size // process_count


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_of_on_corrupt(value: str) -> str:
    if value not in ON_CORRUPT:
        raise UserError(f"data.on_corrupt: no {value!r}; it is one of {', '.join(ON_CORRUPT)}")
    return value


def _with_mask(example: dict, real: bool) -> dict:
    return {**example, "mask": np.float32(real)}


_warned: set[str] = set()


def _warn(message: str) -> None:
    """Logs a bad example once in a process, not in every epoch."""
    if message not in _warned:
        _warned.add(message)
        logging.getLogger(__name__).warning(message)
