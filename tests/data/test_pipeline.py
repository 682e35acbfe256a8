"""Pipelines: a batch is a function of its step, whatever reads it; evaluation sees every example once."""

import itertools
import logging
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from research.core.errors import deliberate
from research.data import pipeline
from research.data.order import Order, steps_per_epoch
from research.data.pipeline import eval_batches, train_batches
from research.data.sources import Arrays, source
from research.data.transforms import build
from tests.data.make import tree, zipped

few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
AUGMENT = build(train=True, size=16, crop="pad", auto="rand-m9-mstd0.5")
PLAIN = build(train=False, size=8, crop=1.0)


def numbers(count):
    """A source whose image i is filled with i."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, 8, 8))
    return Arrays(images, np.arange(count) % 5, num_classes=5)


def taken(batches, count=None):
    with batches:
        return list(itertools.islice(batches, count))


def joined(batches):
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# Training.


def test_batches_have_the_stated_arrays():
    [batch] = taken(train_batches(source("digits"), AUGMENT, batch_size=6, seed=0), 1)
    stated = {
        "image": ((6, 16, 16, 3), "uint8"),
        "label": ((6,), "int32"),
        "index": ((6,), "int32"),
        "mask": ((6,), "float32"),
    }
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == stated
    assert np.all(batch["mask"] == 1) and np.array_equal(source("digits").labels[batch["index"]], batch["label"])


@few
@hypothesis.given(
    count=st.sampled_from([1, 2, 3, 4, 6]),
    rows=st.integers(1, 3),
    start=st.integers(0, 40),
    repeats=st.integers(1, 3),
    length=st.integers(1, 30),
    seed=st.integers(0, 5),
)
def test_batch_of_a_step_does_not_depend_on_processes_or_restarts(count, rows, start, repeats, length, seed):
    options = dict(batch_size=12 * rows, seed=seed, repeats=repeats, threads=2)
    data = numbers(length)
    expected = taken(train_batches(data, AUGMENT, **options), start + 2)[start:]
    shares = [
        taken(train_batches(data, AUGMENT, start_step=start, process_index=p, process_count=count, **options), 2)
        for p in range(count)
    ]
    for step in range(2):
        assert same(joined([share[step] for share in shares]), expected[step])


@few
@hypothesis.given(length=st.integers(1, 200), batch=st.integers(1, 64), seed=st.integers(0, 3))
def test_an_epoch_is_a_part_of_a_permutation_and_epochs_differ(length, batch, seed):
    steps = steps_per_epoch(range(length), batch)
    order = Order(length, batch, seed, steps)
    epochs = [[order(e * steps + s, r) for s in range(steps) for r in range(batch)] for e in range(3)]
    for indices in epochs:
        count = np.bincount(indices, minlength=length)
        assert len(count) == length and count.max() - count.min() <= 1
        assert count.max() == 1 or batch > length
    if length > 20:
        assert epochs[0] != epochs[1] != epochs[2]


def test_seeds_give_different_orders_and_augmentations():
    one, two = (taken(train_batches(source("digits"), AUGMENT, batch_size=32, seed=s), 1)[0] for s in (0, 1))
    assert (one["index"] != two["index"]).any()
    data = Arrays(np.repeat(source("digits")[0]["image"][None], 4, 0), np.zeros(4, int))
    [first, second] = taken(train_batches(data, AUGMENT, batch_size=4, seed=0), 2)
    assert len({image.tobytes() for image in np.concatenate([first["image"], second["image"]])}) == 8


def test_threads_and_prefetch_change_nothing():
    results = [
        taken(train_batches(numbers(20), AUGMENT, batch_size=8, seed=3, threads=t, prefetch=p), 4)
        for t, p in ((1, 1), (4, 2), (16, 5))
    ]
    assert all(same(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_long_data_are_shuffled_in_constant_memory():
    order = Order(2**31 - 1, 64, seed=1, steps=2**24)
    indices = [order(step, row) for step in (0, 9_999_999) for row in range(64)]
    assert len(set(indices)) == 128 and min(indices) >= 0 and max(indices) < 2**31 - 1
    assert 0.3 < np.mean(indices) / 2**31 < 0.7
    order = Order(70_000, 100, seed=1, steps=700)
    assert sorted(order(step, row) for step in range(700, 1400) for row in range(100)) == list(range(70_000))


def test_shuffling_is_fair():
    # Where the examples of 200 epochs land: each position sees each example about equally often.
    order = Order(10, 10, seed=1, steps=1)
    places = np.array([[order(epoch, row) for row in range(10)] for epoch in range(2000)])
    counts = np.array([np.bincount(column, minlength=10) for column in places.T])
    assert counts.min() > 140 and counts.max() < 260


# Repeated augmentation.


def sampled(shuffled, ranks, repeats, batch):
    """Batches of one epoch as timm's RepeatAugSampler deals them: [step][rank][k]."""
    repeated = np.repeat(shuffled, repeats)
    total = -(-len(repeated) // ranks) * ranks
    repeated = np.concatenate([repeated, repeated[: total - len(repeated)]])
    selected = int(len(shuffled) // 256 * 256 / ranks)
    own = [repeated[rank::ranks][:selected] for rank in range(ranks)]
    return [[o[s * batch : (s + 1) * batch] for o in own] for s in range(selected // batch)]


@pytest.mark.parametrize(
    "length, ranks, batch, repeats", [(1000, 8, 16, 3), (600, 4, 8, 2), (256, 2, 32, 3), (515, 1, 64, 4)]
)
def test_repeats_are_dealt_as_timm_deals_them(length, ranks, batch, repeats):
    steps = steps_per_epoch(range(length), ranks * batch, repeats)
    shuffled = [Order(length, length, 7, 1)(0, row) for row in range(length)]
    expected = sampled(np.array(shuffled), ranks, repeats, batch)
    assert len(expected) == steps
    order = Order(length, ranks * batch, 7, steps, repeats, group=batch)
    for step in range(steps):
        rows = np.array([order(step, row) for row in range(ranks * batch)]).reshape(ranks, batch)
        np.testing.assert_array_equal(rows, np.array(expected[step]))


def test_copies_stand_together_without_groups_and_are_augmented_differently():
    [batch] = taken(train_batches(source("digits"), AUGMENT, batch_size=12, seed=0, repeats=3), 1)
    index = batch["index"].reshape(4, 3)
    assert np.all(index == index[:, :1]) and len(set(index[:, 0])) == 4
    assert len({image.tobytes() for image in batch["image"]}) == 12


@pytest.mark.parametrize(
    "length, batch, repeats, steps",
    [
        (1_281_167, 2048, 1, 625),
        (1_281_167, 2048, 3, 625),
        (1000, 128, 3, 6),
        (1000, 128, 1, 7),
        (100, 32, 3, 3),
        (5, 8, 1, 1),
    ],
)
def test_steps_per_epoch(length, batch, repeats, steps):
    assert steps_per_epoch(range(length), batch, repeats) == steps


# Evaluation.


@few
@hypothesis.given(length=st.integers(1, 40), count=st.sampled_from([1, 2, 3, 4]), rows=st.integers(1, 5))
def test_evaluation_sees_every_example_once(length, count, rows):
    data = numbers(length)
    shares = [
        taken(eval_batches(data, PLAIN, batch_size=count * rows, process_index=p, process_count=count, threads=2))
        for p in range(count)
    ]
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) == -(-length // (count * rows))
    whole = joined([batch for share in shares for batch in share])
    assert whole["image"].shape == (len(shares[0]) * count * rows, 8, 8, 3)
    real = whole["mask"] == 1
    assert sorted(whole["index"][real]) == list(range(length))
    assert set(np.unique(whole["mask"])) <= {0.0, 1.0}
    np.testing.assert_array_equal(whole["image"][:, 0, 0, 0], whole["index"])
    np.testing.assert_array_equal(whole["label"], whole["index"] % 5)


def test_evaluation_is_in_the_data_s_order():
    batches = taken(eval_batches(numbers(7), PLAIN, batch_size=4))
    assert [list(b["index"]) for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 0]]
    assert list(batches[1]["mask"]) == [1, 1, 1, 0]


# Corrupt images.


@pytest.fixture
def damaged(tmp_path):
    """Ten images of two classes; numbers 3 and 4 are broken."""
    files = tree(tmp_path / "data", [f"{c}/{i}.jpg" for c in ("a", "b") for i in range(5)])
    files["a/3.jpg"], files["a/4.jpg"] = files["a/3.jpg"][:-100], b""
    return source(path=str(zipped(tmp_path / "x.zip", files)))


def test_corrupt_image_ends_with_its_name(damaged):
    for batches in (train_batches(damaged, PLAIN, batch_size=10, seed=0), eval_batches(damaged, PLAIN, batch_size=10)):
        with pytest.raises(ValueError, match=r"x\.zip/a/[34]\.jpg: .*data\.on_corrupt=skip") as error:
            taken(batches, 5)
        assert deliberate(error.value) and "\n" not in str(error.value)


def test_corrupt_image_is_skipped_deterministically_and_logged_once(damaged, caplog):
    pipeline._warned.clear()
    with caplog.at_level(logging.WARNING):
        first = taken(train_batches(damaged, PLAIN, batch_size=10, seed=0, on_corrupt="skip"), 6)
        again = taken(train_batches(damaged, PLAIN, batch_size=10, seed=0, on_corrupt="skip", start_step=4), 2)
    assert all(same(a, b) for a, b in zip(first[4:], again, strict=True))
    assert all(sorted(batch["index"]) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9] for batch in first)
    assert all(np.all(batch["mask"] == 1) for batch in first)
    names = [record.getMessage() for record in caplog.records]
    assert sum("a/3.jpg: " in n and "truncated" in n for n in names) == 1 and sum("a/4.jpg: " in n for n in names) == 1


def test_evaluation_leaves_corrupt_images_out(damaged):
    whole = joined(taken(eval_batches(damaged, PLAIN, batch_size=4, on_corrupt="skip")))
    assert sorted(whole["index"][whole["mask"] == 1]) == [0, 1, 2, 5, 6, 7, 8, 9]


def test_nothing_but_corrupt_images_is_an_error_not_a_hang(tmp_path):
    data = source(path=str(zipped(tmp_path / "x.zip", {"a/1.jpg": b"no", "b/2.jpg": b"no"})))
    with pytest.raises(ValueError, match="none of the 2 examples"):
        taken(train_batches(data, PLAIN, batch_size=2, seed=0, on_corrupt="skip"), 1)


def test_other_errors_of_a_transform_pass_unchanged():
    def broken(example, rng):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        taken(train_batches(numbers(4), broken, batch_size=2, seed=0), 1)


# Wrong arguments.


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(batch_size=9, process_count=2), "batch_size: 9 .* 2 processes"),
        (dict(batch_size=0), "batch_size: 0"),
        (dict(batch_size=8, group=3), "batch_size: 8 .* groups of 3"),
        (dict(batch_size=8, repeats=0), "data.repeats: 0"),
        (dict(batch_size=8, on_corrupt="ignore"), "data.on_corrupt.*raise, skip"),
    ],
)
def test_wrong_arguments_are_named(options, text):
    with pytest.raises(ValueError, match=text) as error:
        train_batches(numbers(20), PLAIN, seed=0, **options)
    assert deliberate(error.value)


def test_empty_sources_are_refused():
    empty = Arrays(np.zeros((0, 8, 8), np.uint8), np.zeros(0, int), name="nothing")
    for batches in (
        lambda: train_batches(empty, PLAIN, batch_size=2, seed=0),
        lambda: eval_batches(empty, PLAIN, batch_size=2),
    ):
        with pytest.raises(ValueError, match="data.path: nothing holds no examples"):
            batches()


# Worker processes.


def test_workers_give_the_same_batches(damaged):
    options = dict(batch_size=4, seed=5, start_step=3, repeats=2, on_corrupt="skip")
    assert_pairs = lambda a, b: all(same(x, y) for x, y in zip(a, b, strict=True))
    assert assert_pairs(
        taken(train_batches(damaged, AUGMENT, **options), 7),
        taken(train_batches(damaged, AUGMENT, workers=2, **options), 7),
    )
    options = dict(batch_size=4, on_corrupt="skip")
    assert assert_pairs(
        taken(eval_batches(damaged, PLAIN, **options)), taken(eval_batches(damaged, PLAIN, workers=2, **options))
    )


def test_corrupt_image_in_a_worker_ends_with_its_name(damaged):
    with pytest.raises(ValueError, match=r"x\.zip/a/[34]\.jpg: .*data\.on_corrupt=skip") as error:
        taken(train_batches(damaged, PLAIN, batch_size=10, seed=0, workers=1), 5)
    assert deliberate(error.value)


def test_killed_worker_is_an_error_within_seconds_and_signals_to_the_job_are_not():
    with train_batches(numbers(20), PLAIN, batch_size=4, seed=0, workers=2) as batches:
        next(batches), next(batches)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for warning in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            for worker in workers:
                os.kill(worker.pid, warning)
        for _ in range(20):
            next(batches)
        os.kill(workers[0].pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="data worker died .*exit code -9.*data.workers"):
            for _ in range(1000):
                next(batches)
        assert time.monotonic() - begin < 20
    assert not multiprocessing.active_children()


PARENT = """
import multiprocessing, os, signal
from tests.data.test_pipeline import PLAIN, numbers
from research.data.pipeline import train_batches
if __name__ == "__main__":
    batches = train_batches(numbers(20), PLAIN, batch_size=4, seed=0, workers=1)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    here = str(pathlib.Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": here}
    run = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(run.stdout.readline())
    assert run.wait() == -signal.SIGKILL
    run.stdout.close()

    def runs():
        try:
            return pathlib.Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 20
    while runs() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs()
