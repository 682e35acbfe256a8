"""Schedules against the golden recipes, optax, and timm's formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import schedules
from research.port import verify


def rates(name, steps=100, **options):
    options = {"lr": 0.5, "steps": steps, "steps_per_epoch": 10} | options
    return np.asarray(jax.vmap(schedules.schedule(name, **options))(jnp.arange(steps)))


def test_golden_recipes(golden):
    with jax.enable_x64(True):
        passed, line = verify.check(golden / "vanillakd" / "lr_schedule.npz")
    assert passed, line


def test_constant_within_an_epoch_as_timm():
    found = rates("cosine", warmup_epochs=3, warmup_lr=0.1, min_lr=0.01).reshape(10, 10)
    assert np.all(found == found[:, :1])
    np.testing.assert_allclose(found[:3, 0], [0.1, 0.1 + 0.4 / 3, 0.1 + 0.8 / 3], rtol=1e-6)
    expected = 0.01 + 0.49 * (1 + np.cos(np.pi * np.arange(3, 10) / 10)) / 2  # epoch 3 of 10, not 0 of 7
    np.testing.assert_allclose(found[3:, 0], expected, rtol=1e-6)


def test_a_rate_that_is_behind_stands_still_first():
    options = dict(warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)
    found, late = rates("cosine", **options), rates("cosine", **options, behind=1.0)
    np.testing.assert_array_equal(late, np.concatenate([found[:10], found[:-10]]))


@pytest.mark.parametrize("warmup", [0, 2])
def test_per_step_after_the_warmup_is_optaxs(warmup):
    found = rates("cosine", warmup_epochs=warmup, warmup_lr=0.1, min_lr=0.05, warmup_prefix=True, per_step=True)
    expected = optax.warmup_cosine_decay_schedule(0.1 if warmup else 0.5, 0.5, 10 * warmup, 100, end_value=0.05)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(found, jax.vmap(expected)(jnp.arange(100)), rtol=1e-5)


def test_cosine_ends_at_the_minimum_and_stays():
    rate = schedules.schedule("cosine", lr=1.0, steps=100, steps_per_epoch=10, min_lr=0.25)
    assert rate(jnp.asarray(100)) == rate(jnp.asarray(10_000)) == 0.25
    assert rate(jnp.asarray(0)) == 1.0


def test_step_and_multistep():
    found = rates("step", decay_epochs=4, decay_rate=0.1, warmup_epochs=1)[::10]
    np.testing.assert_allclose(found, [0, *[0.5] * 3, *[0.05] * 4, *[0.005] * 2], rtol=1e-6)
    found = rates("multistep", milestones=(2, 5), decay_rate=0.5, min_lr=0.2)[::10]
    np.testing.assert_allclose(found, [*[0.5] * 2, *[0.25] * 3, *[0.2] * 5], rtol=1e-6)
    assert np.all(rates("constant", per_step=True) == np.float32(0.5))


def test_optax_accepts_it_on_a_traced_step():
    tx = optax.scale_by_learning_rate(schedules.schedule("cosine", lr=0.5, steps=10, steps_per_epoch=1))
    updates, _ = jax.jit(tx.update)(jnp.ones(2), tx.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, -0.5)


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("cosin", {}, "'cosin'.*cosine"),
        ("cosine", {"warmup_epochs": 10}, "warmup_epochs=10"),
        ("multistep", {}, "milestones"),
    ],
)
def test_bad_options_are_errors(name, options, problem):
    with pytest.raises(ValueError, match=problem):
        rates(name, **options)


def test_a_warm_up_that_reaches_its_rate_in_its_last_step():
    options = dict(lr=1.0, steps=100, steps_per_epoch=10, warmup_epochs=2, warmup_prefix=True, warmup_reaches=True)
    rate = schedules.schedule("cosine", **options, per_step=True)
    np.testing.assert_allclose([rate(s) for s in range(21)], [*np.linspace(0, 1, 20), 1.0], rtol=1e-6)
    rate = schedules.schedule("cosine", **options)
    np.testing.assert_allclose([rate(s) for s in (0, 9, 10, 19, 20)], [0, 0, 1, 1, 1])
