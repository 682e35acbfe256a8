"""Probes of frozen features against scikit-learn, on the embedded digits."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from research.backbones import linear_probe, probe
from research.data import sources


def _features(split, count=None):
    source = sources.digits(split)
    return source.images[:count, ..., 0].reshape(-1, 64).astype(np.float32) / 255, source.labels[:count]


@pytest.fixture(scope="module")
def bank():
    return _features("train", 700)


@pytest.fixture(scope="module")
def asked():
    return _features("test")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """scikit-learn's many threads for small work only wait for each other."""
    with threadpool_limits(1):
        yield


def test_knn_is_scikit_learns(bank, asked):
    found = probe.knn(*bank, *asked, 10, ks=(5, 20), temperature=0.07, block=100)  # blocks that do not divide either
    for k in (5, 20):
        exponential = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(*bank)
        plain = KNeighborsClassifier(k, metric="cosine").fit(*bank)
        assert found[f"k{k}/top1"] == pytest.approx(exponential.score(*asked), abs=1e-9)
        assert found[f"k{k}/plain_top1"] == pytest.approx(plain.score(*asked), abs=1e-9)
        chances, own = exponential.predict_proba(asked[0]), asked[1]
        better = (chances > chances[np.arange(len(own)), own][:, None]).sum(1)
        top5 = np.mean((better < 5) & (chances[np.arange(len(own)), own] > 0))
        assert found[f"k{k}/top5"] == pytest.approx(top5, abs=1e-9)
    assert found["k5/top1"] != found["k5/plain_top1"]


def test_nearest_of_equals_is_the_first_in_any_blocks(bank):
    twice = np.concatenate([bank[0][:50], bank[0][:50], 2 * bank[0][:50]])  # the cosine does not see length
    for block in (7, 50, 4096):
        cosines, places = probe.nearest(jnp.asarray(probe.blocks(twice, block)), len(twice), bank[0][:50], 3)
        np.testing.assert_array_equal(places, np.arange(50)[:, None] + np.array([[0, 50, 100]]))
        np.testing.assert_allclose(cosines, 1, rtol=1e-6)


def test_votes_of_few_do_not_reach_the_first_five():
    bank, labels = np.eye(2, dtype=np.float32), np.array([7, 8])
    found = probe.knn(bank, labels, bank, np.array([0, 8]), 10, ks=(2,))
    # Class 0 ties with six others at no votes, but nobody voted for it.
    assert found == {"k2/top1": 0.5, "k2/top5": 0.5, "k2/plain_top1": 0.0}


@pytest.mark.parametrize("shots", [2, 15])  # fewer examples than features, and more
@pytest.mark.parametrize("l2", [1024.0, 2.0**-10])
def test_least_squares_is_scikit_learns_ridge(bank, asked, shots, l2):
    features, labels = bank
    telling = features.std(0) > 0.1  # a pixel that is constant in the shots has deviation 1e-5, and blows up rounding
    features, asked = features[:, telling], asked[0][:, telling].astype(np.float64)
    places = probe.few(labels, shots, 10, seed=1)
    x, y = features[places].astype(np.float64), labels[places]
    fit = probe.least_squares(features[places], y, 10)
    mean, std = x.mean(0), x.std(0) + 1e-5
    augment = lambda x: np.concatenate([(x - mean) / std, np.full((len(x), 1), 100.0)], axis=1)
    targets = np.where(y[:, None] == np.arange(10), 1.0, -1.0)
    ridge = Ridge(l2, fit_intercept=False, solver="svd").fit(augment(x), targets)
    np.testing.assert_allclose(probe.regressed(fit, asked, l2), ridge.predict(augment(asked)), rtol=1e-6, atol=1e-6)


def test_shots_are_drawn_evenly_and_anew_for_every_seed(bank):
    draws = [probe.few(bank[1], 3, 10, seed) for seed in (0, 0, 1)]
    for places in draws:
        np.testing.assert_array_equal(bank[1][places], np.repeat(np.arange(10), 3))
        assert len(set(places)) == 30
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    with pytest.raises(ValueError, match=r"shots: 9 of each class, but class 3 has 8 examples"):
        probe.few(np.repeat([0, 1, 2, 3], [9, 9, 9, 8]), 9, 4, 0)


@pytest.mark.parametrize("l2", [1.0, 100.0])
def test_logistic_is_scikit_learns(bank, asked, l2):
    features, labels = bank
    chosen = np.arange(len(features)) % 2 == 0
    fit = linear_probe.logistic(5 * features + 3, labels, 10, l2, chosen=chosen, tolerance=1e-7, block=150)
    x = 5 * features[chosen].astype(np.float64) + 3
    truth = LogisticRegression(C=1 / l2, solver="newton-cg", max_iter=1000, tol=1e-9).fit(x, labels[chosen])
    scale = np.abs(truth.coef_).max()
    np.testing.assert_allclose(fit.kernel, truth.coef_.T, atol=1e-4 * scale)
    asked = 5 * asked[0] + 3
    chances = np.exp(fit(asked) - np.max(fit(asked), 1, keepdims=True))
    np.testing.assert_allclose(chances / chances.sum(1, keepdims=True), truth.predict_proba(asked), atol=1e-4)

    def objective(kernel, bias):
        losses = optax.softmax_cross_entropy_with_integer_labels
        logits = (x @ kernel + bias).astype(np.float32)
        return float(jnp.sum(losses(jnp.asarray(logits), jnp.asarray(labels[chosen])))) + l2 / 2 * np.sum(kernel**2)

    # It is a minimum: no worse than theirs, up to float32.
    assert objective(fit.kernel, fit.bias) <= objective(truth.coef_.T, truth.intercept_) * (1 + 1e-5)
    assert fit.steps < 1000


def test_features_that_say_nothing_leave_the_class_frequencies():
    labels = np.repeat([0, 1], [30, 10])
    fit = linear_probe.logistic(np.full((40, 3), 2.0, np.float32), labels, 2, 1.0)
    logits = fit(np.full((1, 3), 2.0, np.float32))[0]
    assert logits[0] - logits[1] == pytest.approx(np.log(3), rel=1e-3)


def test_the_search_finds_a_peak_with_few_trials():
    for peak in (-6.0, -3.125, 0.25, 5.875, 6.0):
        tried = []

        def score(l2, peak=peak, tried=tried):
            tried.append(l2)
            return -abs(np.log10(l2) - peak)

        assert np.log10(linear_probe.strongest(score)) == pytest.approx(peak)
        assert len(tried) == len(set(tried)) <= 15
    assert linear_probe.strongest(lambda l2: 0.5) == pytest.approx(1e6)


def test_a_fifth_of_every_class_is_held_out():
    labels = np.repeat([2, 0, 1], [10, 4, 7])
    held = linear_probe.held_out(labels)
    np.testing.assert_array_equal(np.bincount(labels[held], minlength=3), [0, 1, 2])
    with pytest.raises(ValueError, match="five training examples"):
        linear_probe.held_out(labels[10:14])


def test_pooled_averages_maps_and_tokens():
    x = np.arange(2 * 3 * 2 * 4, dtype=np.float32).reshape(2, 3, 2, 4)
    endpoints = {
        "map": jnp.asarray(x, jnp.bfloat16),
        "tokens": x.reshape(2, 6, 4),
        "pooled": x[:, 0, 0],
        "scale": x[0, 0, 0],
    }
    for name in ("map", "tokens"):
        np.testing.assert_array_equal(probe.pooled(endpoints, name), x.mean((1, 2)))
    assert probe.pooled(endpoints, "map").dtype == jnp.float32
    np.testing.assert_array_equal(probe.pooled(endpoints), x[:, 0, 0])
    with pytest.raises(ValueError, match="no 'poled'; did you mean pooled"):
        probe.pooled(endpoints, "poled")
    with pytest.raises(ValueError, match="scale has shape"):
        probe.pooled(endpoints, "scale")


def test_a_bank_smaller_than_k_is_refused(bank):
    with pytest.raises(ValueError, match="k: 20 neighbours of a bank of 12 examples"):
        probe.knn(bank[0][:12], bank[1][:12], *bank, 10, ks=(10, 20))
