"""Stored labels on the device: the teacher's logits come back, label maps are what it says of each place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from research.backbones import classify
from research.data import mixup
from research.distill import ensembles, stored, stored_labels

LOGITS = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32) * 40


def batch_of(found):
    return {f"known_{name}": value for name, value in found.items()}


def test_all_classes_give_the_logits_back_however_small_their_probability():
    found = stored.label(jnp.asarray(LOGITS), 7)
    assert sorted(found) == ["logp", "lse"] and float(jnp.min(found["logp"])) < -90
    np.testing.assert_allclose(stored.known(batch_of(found), 7), LOGITS, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("form", stored_labels.FORMS)
def test_the_largest_classes_become_a_distribution(form):
    logits = jnp.asarray(LOGITS / 20)
    found = stored.label(logits, 3)
    np.testing.assert_array_equal(found["classes"], np.sort(np.argsort(LOGITS, -1)[:, -3:], -1))
    expected = stored_labels.densify(*stored_labels.sparsify(jax.nn.softmax(logits), 3), 7, form=form)
    known = stored.known(batch_of(found), 7, form=form)
    np.testing.assert_allclose(jax.nn.softmax(known), expected, rtol=1e-5, atol=1e-7)
    assert np.isfinite(known).all()


def test_several_teachers_are_stored_as_their_mean_probability():
    several = jnp.stack([jnp.asarray(LOGITS / 9), jnp.asarray(LOGITS[::-1] / 5)])
    found = stored.label(several, 7)
    known = stored.known(batch_of(found), 7)
    np.testing.assert_allclose(jax.nn.softmax(known), ensembles.soft_label(several), rtol=1e-5, atol=1e-7)


def test_float16_keeps_probabilities_to_a_thousandth():
    found = stored.label(jnp.asarray(LOGITS / 20), 7)
    half = batch_of(found | {"logp": found["logp"].astype(jnp.float16)})
    np.testing.assert_allclose(softmax(stored.known(half, 7), -1), softmax(LOGITS / 20, -1), rtol=5e-3)
    np.testing.assert_allclose(found["lse"], logsumexp(LOGITS / 20, -1), rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        found = stored.label(jnp.asarray(LOGITS, jnp.float64), 4)
        assert found["logp"].dtype == found["lse"].dtype == jnp.float64
        assert stored.known(batch_of(found), 7).dtype == jnp.float64


def test_targets_are_the_device_mixings_example_by_example():
    label, partner = jnp.asarray([0, 3, 2]), jnp.asarray([1, 3, 6])
    lam = jnp.asarray([0.25, 1.0, 0.6])
    found = stored.targets({"label": label, "partner": partner, "lam": lam}, 7, smoothing=0.1)
    for row in range(3):
        one = mixup.mixed_target(
            label[row : row + 1], lam[row], num_classes=7, smoothing=0.1, partners=partner[row:][:1]
        )
        np.testing.assert_allclose(found[row], one[0], rtol=1e-6)


@pytest.fixture(scope="module")
def teacher():
    network = classify.network("resnet8", 10, 32, layers=(1, 1, 1), channels=(4, 8, 8), stem_width=4)
    return network, *jax.jit(network.init)(jax.random.PRNGKey(0))


def test_the_mean_of_a_label_map_is_the_teachers_logits(teacher):
    network, params, model_state = teacher
    head = stored.find_head(network, params, model_state)
    images = jax.random.uniform(jax.random.PRNGKey(1), (2, 32, 32, 3))
    logits = network.apply(params, model_state, images)[0]
    found = stored.label_map(network, head, 10)(params, model_state, images)
    assert found["scores"].shape == (2, 8, 8, 10)
    dense = np.zeros((2, 8, 8, 10))
    np.put_along_axis(dense, np.asarray(found["classes"]), np.asarray(found["scores"]), -1)
    np.testing.assert_allclose(dense.mean((1, 2)), logits, rtol=1e-4, atol=1e-5)
    assert log_softmax(dense, -1).shape == (2, 8, 8, 10)


def stirred(variables):
    """The same without the zeros that heads start with."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), variables)


def test_tokens_make_a_map_and_a_class_token_none():
    small = dict(img_size=16, patch_size=4, embed_dim=8)
    mixer = classify.network("mixer_s16_224", 10, 16, num_blocks=1, **small)
    params, model_state = stirred(jax.jit(mixer.init)(jax.random.PRNGKey(0)))
    found = stored.find_head(mixer, params, model_state)
    shapes = jax.eval_shape(stored.label_map(mixer, found, 3), params, model_state, jnp.zeros((2, 16, 16, 3)))
    assert shapes["scores"].shape == (2, 4, 4, 3)
    vit = classify.network("deit_tiny_patch16_224", 10, 16, depth=1, num_heads=2, **small)
    with pytest.raises(ValueError, match="--form maps: deit_tiny_patch16_224 has no linear head on the mean"):
        stored.find_head(vit, *stirred(jax.jit(vit.init)(jax.random.PRNGKey(0))))
