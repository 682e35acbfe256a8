"""Placing ahead changes when a batch is put on the devices, and nothing else."""

import threading

import pytest

from research.data.prefetch import Placed


def test_order_and_values_stay():
    with Placed(iter(range(50)), lambda batch: batch + 100, ahead=3) as placed:
        assert list(placed) == list(range(100, 150))


def test_next_batches_are_placed_before_they_are_asked_for():
    placed, third = [], threading.Event()

    def put(batch):
        placed.append(batch)
        if len(placed) == 3:
            third.set()
        return batch

    with Placed(iter(range(100)), put, ahead=1) as batches:
        assert next(batches) == 0
        assert third.wait(10)  # 1 waits in the queue, 2 is about to
        assert len(placed) == 3  # and no more: they take memory


def test_errors_come_in_the_place_of_their_batch():
    def read():
        yield from (1, 2)
        raise ValueError("the third is damaged")

    batches = Placed(read(), lambda batch: batch, ahead=2)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(ValueError, match="the third is damaged"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_closing_ends_the_thread_and_the_batches():
    class Batches:
        closed = False

        def __next__(self):
            return 1

        def close(self):
            self.closed = True

    source = Batches()
    batches = Placed(source, lambda batch: batch)
    next(batches)
    batches.close()
    batches.close()
    assert source.closed and not batches._thread.is_alive()
    with pytest.raises(StopIteration):
        next(batches)
