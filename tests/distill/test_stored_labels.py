"""Sparse labels and what is made of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from research.distill.stored_labels import densify, sparsify

PROBABILITIES = jnp.asarray(softmax(np.random.default_rng(0).normal(size=(4, 7)) * 2, -1), jnp.float32)


@settings(max_examples=10, deadline=None)
@given(k=st.integers(1, 7), form=st.sampled_from(["smooth", "zeros", "renormalize"]))
def test_dense_labels_are_distributions_that_keep_the_order(k, form):
    index, value = sparsify(PROBABILITIES, k)
    dense = densify(index, value, 7, form=form)
    np.testing.assert_allclose(jnp.sum(dense, -1), 1, rtol=1e-5)
    np.testing.assert_array_equal(jnp.argmax(dense, -1), jnp.argmax(PROBABILITIES, -1))
    if form == "smooth":
        kept = np.take_along_axis(np.asarray(dense), np.asarray(index), 1)
        np.testing.assert_allclose(kept, value, rtol=1e-6)


def test_all_classes_give_the_teacher_back():
    np.testing.assert_allclose(densify(*sparsify(PROBABILITIES, 7), 7), PROBABILITIES, rtol=1e-6)


def test_the_kept_classes_are_the_largest():
    index, value = sparsify(PROBABILITIES, 3)
    order = np.argsort(np.asarray(PROBABILITIES), -1)[:, -3:]
    np.testing.assert_array_equal(index, np.sort(order, -1))
    np.testing.assert_array_equal(value, np.take_along_axis(np.asarray(PROBABILITIES), np.asarray(index), 1))


def test_too_much_mass_falls_back_to_the_softmax_of_probabilities():
    index, value = jnp.asarray([[0, 2]]), jnp.asarray([[0.8, 0.4]])
    np.testing.assert_array_equal(densify(index, value, 4), densify(index, value, 4, form="zeros"))
    np.testing.assert_allclose(densify(index, value, 4)[0, [0, 2]], softmax([0.8, 0.4]), rtol=1e-6)


def test_what_is_refused():
    with pytest.raises(ValueError, match="k=8 of 7 classes"):
        sparsify(PROBABILITIES, 8)
    with pytest.raises(ValueError, match="choose one of smooth, zeros, renormalize"):
        densify(*sparsify(PROBABILITIES, 2), 7, form="hard")
