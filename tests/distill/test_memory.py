"""CRD: its loss against plain NumPy, the memory's update, and how negatives are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distill import memory

N, D, B, K = 12, 4, 3, 5
RNG = np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def inputs():
    student, teacher = (jnp.asarray(unit(RNG.normal(size=(B, D))), jnp.float32) for _ in range(2))
    state = memory.empty(jax.random.key(0), N, D)
    index = jnp.asarray([4, 0, 9], jnp.int32)
    negatives = jnp.asarray(RNG.integers(0, N, (B, K)), jnp.int32)
    return student, teacher, state, index, negatives


STEP = jax.jit(memory.crd)


def plain(vectors, rows, index, negatives, z=None, temperature=0.07):
    """One direction of the loss, and its normaliser."""
    candidates = np.concatenate([index[:, None], negatives], 1)
    scores = np.exp(np.einsum("bkd,bd->bk", rows[candidates].astype(np.float64), vectors) / temperature)
    z = scores.mean() * N if z is None else z
    p, noise = scores / z, K / N
    return -np.log(p[:, 0] / (p[:, 0] + noise + 1e-7)) - np.log(noise / (p[:, 1:] + noise + 1e-7)).sum(1), z


def test_two_steps_are_those_of_the_definition(inputs):
    student, teacher, state, index, negatives = inputs
    loss, new = STEP(*inputs)
    one, z_student = plain(student, np.asarray(state.teacher), index, negatives)
    two, z_teacher = plain(teacher, np.asarray(state.student), index, negatives)
    np.testing.assert_allclose(loss, one + two, rtol=1e-4)
    np.testing.assert_allclose(jnp.exp(new.log_z), [z_student, z_teacher], rtol=1e-4)
    # The second batch keeps the normalisers of the first and sees its update of the memory.
    again, newer = STEP(teacher, student, new, index, negatives)
    one, _ = plain(teacher, np.asarray(new.teacher), index, negatives, z_student)
    two, _ = plain(student, np.asarray(new.student), index, negatives, z_teacher)
    np.testing.assert_allclose(again, one + two, rtol=1e-4)
    np.testing.assert_array_equal(newer.log_z, new.log_z)


def test_only_the_batchs_rows_move(inputs):
    student, teacher, state, index, _ = inputs
    _, new = STEP(*inputs)
    rest = np.setdiff1d(np.arange(N), index)
    for name, vectors in (("student", student), ("teacher", teacher)):
        before, after = (np.asarray(getattr(m, name)) for m in (state, new))
        np.testing.assert_array_equal(after[rest], before[rest])
        np.testing.assert_allclose(after[index], unit(0.5 * before[index] + 0.5 * np.asarray(vectors)), rtol=1e-5)


def test_of_an_example_the_batch_holds_twice_the_last_enters(inputs):
    student, teacher, state, _, negatives = inputs
    index = jnp.asarray([4, 9, 4], jnp.int32)
    _, new = STEP(student, teacher, state, index, negatives)
    expected = unit(0.5 * np.asarray(state.student)[[9, 4]] + 0.5 * np.asarray(student)[[1, 2]])
    np.testing.assert_allclose(new.student[np.asarray([9, 4])], expected, rtol=1e-5)


def test_gradients_reach_both_embeddings_and_nothing_else(inputs):
    student, teacher, state, index, negatives = inputs
    mean = lambda s, t, m: jnp.mean(memory.crd(s, t, m, index, negatives)[0])
    *both, bank = jax.jit(jax.grad(mean, (0, 1, 2)))(student, teacher, state)
    assert all(np.all(np.isfinite(g)) and np.any(g) for g in both)
    assert not any(np.any(g) for g in (bank.log_z, bank.ready))


def test_candidates_may_be_gathered_in_parts(inputs, monkeypatch):
    whole = jax.jit(lambda *a: memory.crd(*a))(*inputs)
    monkeypatch.setattr(memory, "_CANDIDATES", 4)
    parts = jax.jit(lambda *a: memory.crd(*a))(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)


def test_low_temperatures_do_not_overflow(inputs):
    total = lambda s: jnp.sum(memory.crd(s, *inputs[1:], temperature=0.005)[0])
    value, gradient = jax.jit(jax.value_and_grad(total))(inputs[0])
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_negatives_are_of_other_classes_uniform_and_repeatable():
    classes = np.asarray([7, 3, 3, 9, 3, 7])
    sample = jax.jit(memory.negative_sampler(classes, 4000))
    index = jnp.arange(6, dtype=jnp.int32)
    drawn = np.asarray(sample(jax.random.key(1), index))
    assert drawn.dtype == np.int32
    for i in range(6):
        rows, counts = np.unique(drawn[i], return_counts=True)
        np.testing.assert_array_equal(rows, np.flatnonzero(classes != classes[i]))
        np.testing.assert_allclose(counts / 4000, 1 / len(rows), atol=0.05)
    # An example's draw depends on the key and its own index, not on its place in the batch.
    np.testing.assert_array_equal(sample(jax.random.key(1), index[::-1])[::-1], drawn)
    assert np.any(np.asarray(sample(jax.random.key(2), index)) != drawn)


def test_one_class_leaves_nothing_to_contrast():
    with pytest.raises(ValueError, match="one class"):
        memory.negative_sampler(np.zeros(5, int), 3)


def test_embeddings_are_of_unit_length_and_safe_at_zero():
    module = memory.Embed(dim=D)
    params = jax.jit(module.init)(jax.random.key(0), jnp.ones((2, 3, 2)))
    x = jnp.asarray(RNG.normal(size=(2, 3, 2)), jnp.float32).at[1].set(0)
    out = module.apply(params, x)
    np.testing.assert_allclose(jnp.linalg.norm(out[0]), 1, rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(module.apply(params, x)))(x)
    assert np.all(np.isfinite(gradient)) and not np.any(out[1])
