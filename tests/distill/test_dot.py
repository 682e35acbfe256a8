"""DOT against its recurrences, and where it is plain SGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.distill.dot import Gradients, dot

RNG = np.random.default_rng(0)
PARAMS = {"a": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "b": jnp.asarray(RNG.normal(size=4), jnp.float32)}


def draw():
    return jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), PARAMS)


def test_two_momenta_and_decay_in_the_tasks_gradient():
    steps, optimizer = [(draw(), draw()) for _ in range(4)], dot(0.1, delta=0.09, weight_decay=0.01)
    params, state = PARAMS, optimizer.init(PARAMS)
    expected = jax.tree.map(np.asarray, PARAMS)
    buffers = [jax.tree.map(np.zeros_like, expected) for _ in range(2)]
    for task, kd in steps:
        updates, state = jax.jit(optimizer.update)(Gradients(task, kd), state, params)
        params = optax.apply_updates(params, updates)
        for name, p in expected.items():
            buffers[0][name] = 0.81 * buffers[0][name] + task[name] + 0.01 * p
            buffers[1][name] = 0.99 * buffers[1][name] + kd[name]
            expected[name] = p - 0.1 * buffers[0][name] - 0.1 * buffers[1][name]
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


def test_without_a_difference_of_momenta_it_is_sgd_of_the_sum():
    schedule = optax.linear_schedule(0.1, 0.0, 5)
    optimizer, sgd = dot(schedule, delta=0.0), optax.sgd(schedule, 0.9)
    states, both = (optimizer.init(PARAMS), sgd.init(PARAMS)), []
    for _ in range(3):
        task, kd = draw(), draw()
        ours, first = optimizer.update(Gradients(task, kd), states[0], PARAMS)
        theirs, second = sgd.update(jax.tree.map(jnp.add, task, kd), states[1], PARAMS)
        states, both = (first, second), [ours, theirs]
        for name in PARAMS:
            np.testing.assert_allclose(*(x[name] for x in both), rtol=1e-5)


def test_leaves_of_one_loss_have_the_plain_momentum():
    optimizer = dot(1.0, delta=0.5, weight_decay=0.1)
    task, kd = draw(), draw()
    state = optimizer.init(PARAMS)
    for _ in range(2):
        updates, state = optimizer.update(Gradients({**task, "b": None}, {**kd, "a": None}), state, PARAMS)
    for name, gradient in (("a", task["a"]), ("b", kd["b"])):
        np.testing.assert_allclose(updates[name], -1.9 * (gradient + 0.1 * PARAMS[name]), rtol=1e-5)


def test_decay_may_spare_leaves():
    optimizer = dot(1.0, weight_decay=0.5, mask=lambda params: {"a": True, "b": False})
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(Gradients(zeros, zeros), optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["a"], -0.5 * PARAMS["a"], rtol=1e-6)
    assert not np.any(updates["b"])


def test_what_it_needs():
    optimizer = dot(1.0)
    with pytest.raises(ValueError, match="update\\(gradients, state, params\\)"):
        optimizer.update(Gradients(PARAMS, PARAMS), optimizer.init(PARAMS))
    nothing = {"a": None, "b": None}
    with pytest.raises(ValueError, match="neither a task nor a distillation gradient"):
        optimizer.update(Gradients(nothing, nothing), optimizer.init(PARAMS), PARAMS)
