"""Metrics are exact under padding, unequal batches and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core import metrics


def data(seed=0, size=24, classes=7):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(size, classes)).astype(np.float32)
    return logits, rng.integers(0, classes, size).astype(np.int32)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_topk_is_a_sort(k):
    logits, labels = data()
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    expected = float(np.sum(best == labels[:, None]))
    assert metrics.topk_correct(logits, labels, np.ones(24, np.float32), k) == (expected, 24)


def test_ties_and_nan_earn_nothing():
    labels = np.asarray([0, 1, 2, 2], np.int32)
    logits = np.zeros((4, 3), np.float32)
    logits[3] = [0, 0, np.nan]
    assert metrics.topk_correct(logits, labels, k=1) == (1, 4)
    assert metrics.topk_correct(logits, labels, k=2) == (2, 4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
def test_any_split_and_padding_gives_the_same_ratio(sizes, seed):
    logits, labels = data(seed, sum(sizes))
    whole = np.mean(np.argmax(logits, 1) == labels)
    found, start = [], 0
    for size in sizes:
        rows = slice(start, start + size)
        padded = np.full((9, 7), np.nan, np.float32)
        padded[:size] = logits[rows]
        mask = (np.arange(9) < size).astype(np.float32)
        label = np.zeros(9, np.int32)
        label[:size] = labels[rows]
        found.append({"top1": metrics.topk_correct(padded, label, mask)})
        start += size
    assert metrics.finish(metrics.merge(*found)) == {"top1": pytest.approx(whole, rel=1e-12)}


def test_sharded_sums_are_exact():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    logits, labels = data()
    mask = (np.arange(24) < 19).astype(np.float32)
    count = jax.jit(metrics.topk_correct)
    assert count(*(jax.device_put(x, rows) for x in (logits, labels, mask))) == count(logits, labels, mask)


def test_mean_accumulates_in_float32_and_ignores_what_is_masked():
    values = jnp.asarray([1.0, 2.0, jnp.nan, jnp.inf], jnp.bfloat16)
    total, count = metrics.mean(values, jnp.asarray([1.0, 1.0, 0.0, 0.0]))
    assert (total, count, total.dtype) == (3, 2, jnp.float32)
    total, count = metrics.mean(jnp.full(4096, 1 + 2**-7, jnp.bfloat16))
    assert metrics.finish({"x": (total, count)})["x"] == 1 + 2**-7
    with jax.enable_x64(True):
        assert metrics.mean(jnp.ones(3, jnp.float64))[0].dtype == jnp.float64


def test_merge_takes_names_as_they_come():
    one, two = {"a": (1.0, 2.0)}, {"a": (3.0, 2.0), "b": (1.0, 0.0)}
    assert metrics.merge(one, two) == {"a": (4.0, 4.0), "b": (1.0, 0.0)}
    found = metrics.finish(metrics.merge(one, two))
    assert found["a"] == 1.0 and np.isnan(found["b"])
    assert metrics.merge() == {}


def test_a_long_evaluation_on_the_host_loses_nothing():
    large, one = np.float32(2**24), np.float32(1)
    ((total, count),) = metrics.merge({"a": (large, large)}, *[{"a": (one, one)}] * 3).values()
    assert (total, count) == (2**24 + 3, 2**24 + 3)
    assert isinstance(metrics.merge({"a": (jnp.ones(()), jnp.ones(()))})["a"][0], jax.Array)


@pytest.mark.parametrize("bins", [1, 15])
def test_calibration_error_is_that_of_its_definition(bins):
    logits, labels = data(size=40)
    logits[3] = [np.nan] * 7
    mask = (np.arange(40) < 33).astype(np.float32)
    parts = [
        metrics.calibration_gaps(*(jnp.asarray(x[i : i + 8]) for x in (logits, labels, mask)), bins=bins)
        for i in range(0, 40, 8)
    ]
    found = metrics.finish(metrics.merge(*[{"ece": part} for part in parts]))["ece"]

    rows = np.exp(logits[:33] - logits[:33].max(1, keepdims=True))
    confidence = (rows / rows.sum(1, keepdims=True)).max(1)
    confidence[3] = 1
    hit = (logits[:33].argmax(1) == labels[:33]) & np.isfinite(logits[:33]).all(1)
    error = 0.0
    for low in range(bins):
        here = (confidence > low / bins) & (confidence <= (low + 1) / bins)
        if here.any():
            error += here.mean() * abs(confidence[here].mean() - hit[here].mean())
    assert found == pytest.approx(error, abs=1e-6)
    assert error > 0.05


def test_a_calibrated_network_has_no_calibration_error():
    logits = jnp.log(jnp.tile(jnp.asarray([[0.75, 0.25]]), (4, 1)))
    assert metrics.finish({"ece": metrics.calibration_gaps(logits, jnp.asarray([0, 0, 0, 1]))})["ece"] < 1e-6
    wrong = metrics.finish({"ece": metrics.calibration_gaps(50 * logits, jnp.asarray([1, 1, 1, 1]))})["ece"]
    assert wrong == pytest.approx(1)
