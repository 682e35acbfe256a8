"""ConvNeXt's endpoints, stems and equivalent forms. Its numbers are checked against official ones by tests/port."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import convnext
from tests.backbones import drawn

SMALL = {"depths": (1, 1), "dims": (8, 16), "num_classes": 5, "kernel_sizes": (3, 7), "ls_init_value": 0.5}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 19, 18, 3))


@pytest.fixture(scope="module")
def variables(images):
    return drawn.variables(convnext.build(**SMALL), images)


@pytest.fixture(scope="module")
def exact(variables, images):
    return jax.jit(convnext.build(**SMALL).apply)(variables, images)[0]


def traced(images, **changes):
    """Shapes of (logits, endpoints)."""
    model = convnext.build(**SMALL, **changes)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], images)


def test_endpoints_are_named_and_shaped(images):
    logits, endpoints = traced(images)
    assert logits.shape == (4, 5)
    assert {key: value.shape[1:] for key, value in endpoints.items()} == {
        "stem": (4, 4, 8),
        "stage1": (4, 4, 8),
        "stage2": (2, 2, 16),
        "pooled": (16,),
    }


def test_convolutions_in_the_mlp_are_dense_layers(variables, images, exact):
    reshape = lambda path, x: x[None, None] if "mlp_fc" in str(path) and x.ndim == 2 else x
    convolutional = jax.tree_util.tree_map_with_path(reshape, variables)
    same, _ = jax.jit(convnext.build(**SMALL, conv_mlp=True).apply)(convolutional, images)
    np.testing.assert_allclose(same, exact, atol=1e-5)


@pytest.mark.parametrize("stem", ["overlap", "overlap_tiered", "overlap_act"])
def test_overlapping_stems_halve_twice(images, stem):
    assert traced(images, stem_type=stem)[1]["stem"].shape[1:] == (5, 5, 8)


def test_an_unknown_stem_is_refused(images):
    with pytest.raises(ValueError, match="stem_type: 'patches'"):
        traced(images, stem_type="patches")


def test_stochastic_depth_and_rematerialisation(variables, images):
    def gradient(remat):
        model = convnext.build(**SMALL, drop_path=0.5, remat=remat)
        total = lambda v, key: jnp.sum(model.apply(v, images, train=True, rngs={"dropout": key})[0])
        return jax.jit(jax.grad(total))

    kernel = lambda grads: grads["params"]["stages_1_blocks_0"]["conv_dw"]["kernel"]
    plain, saved = gradient(False), gradient(True)
    first, other = (kernel(plain(variables, jax.random.key(seed))) for seed in (0, 2))
    np.testing.assert_allclose(kernel(saved(variables, jax.random.key(0))), first, rtol=1e-4, atol=1e-6)
    assert float(jnp.max(jnp.abs(first - other))) > 1e-4
