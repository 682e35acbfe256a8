"""ViT's tokens, heads and options. Its numbers are checked against official ones by tests/port."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from research.backbones import vit
from research.core import optim

SMALL = {"img_size": (24, 16), "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 24, 16, 3))


@pytest.fixture(scope="module")
def variables(images):
    """Random variables of the distilled network, with weights large enough to matter."""
    variables = jax.jit(vit.build(**SMALL, distilled=True).init)(jax.random.key(0), images[:1])
    return jax.tree.map(lambda x: 8 * x, variables)


@pytest.fixture(scope="module")
def exact(variables, images):
    return jax.jit(vit.build(**SMALL, distilled=True).apply)(variables, images)


def traced(images, **changes):
    """Shapes of ((logits, endpoints), variables)."""
    model = vit.build(**{**SMALL, **changes})
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)


def test_endpoints_are_named_and_shaped(images):
    (logits, endpoints), _ = traced(images)
    assert logits.shape == (4, 5)
    assert {key: value.shape[1:] for key, value in endpoints.items()} == {
        "patch_embed": (6, 12),
        "block01": (7, 12),
        "block02": (7, 12),
        "tokens": (7, 12),
        "pooled": (12,),
    }


@pytest.mark.parametrize(
    "changes, tokens",
    [
        ({"distilled": True}, 8),
        ({"global_pool": "avg"}, 7),
        ({"global_pool": "avg", "class_token": False}, 6),
        ({"no_embed_class": True}, 7),
    ],
)
def test_tokens_and_positions_of_each_form(images, changes, tokens):
    (_, endpoints), variables = traced(images, **changes)
    positions = 6 if "no_embed_class" in changes else tokens
    assert endpoints["tokens"].shape == (4, tokens, 12)
    assert variables["params"]["pos_embed"].shape == (1, positions, 12)


def test_without_classes_the_logits_are_the_pooled_features(images):
    (logits, _), variables = traced(images, num_classes=0, distilled=True)
    assert logits.shape == (4, 12) and not {"head", "head_dist"} & set(variables["params"])


def test_distilled_heads_are_averaged_in_evaluation_and_apart_in_training(variables, images, exact):
    logits, endpoints = exact
    np.testing.assert_allclose(logits, (endpoints["head"] + endpoints["head_dist"]) / 2, atol=1e-6)
    np.testing.assert_allclose(endpoints["pooled"], endpoints["tokens"][:, :2].mean(1), atol=1e-6)
    training, taps = jax.jit(lambda v, x: vit.build(**SMALL, distilled=True).apply(v, x, train=True))(variables, images)
    np.testing.assert_allclose(training, endpoints["head"], atol=1e-5)
    np.testing.assert_allclose(taps["head_dist"], endpoints["head_dist"], atol=1e-5)
    assert float(jnp.max(jnp.abs(endpoints["head"] - endpoints["head_dist"]))) > 1e-2


def test_only_positions_tell_patches_apart(variables, images, exact):
    params = dict(variables["params"])
    params["pos_embed"] = jnp.zeros_like(params["pos_embed"])
    upside_down = images.reshape(4, 3, 8, 16, 3)[:, ::-1].reshape(images.shape)
    apply = jax.jit(vit.build(**SMALL, distilled=True).apply)
    same, _ = apply({"params": params}, upside_down)
    np.testing.assert_allclose(same, apply({"params": params}, images)[0], atol=1e-5)
    assert float(jnp.max(jnp.abs(apply(variables, upside_down)[0] - exact[0]))) > 1e-3


def test_stochastic_depth_and_rematerialisation(variables, images):
    def gradient(remat):
        model = vit.build(**SMALL, distilled=True, drop_path=0.5, remat=remat)
        total = lambda v, key: jnp.sum(model.apply(v, images, train=True, rngs={"dropout": key})[0] ** 2)
        return jax.jit(jax.grad(total))

    kernel = lambda grads: grads["params"]["blocks_1"]["attn"]["qkv"]["kernel"]
    plain, saved = gradient(False), gradient("dots_saveable")
    first, other = (kernel(plain(variables, jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_allclose(kernel(saved(variables, jax.random.key(0))), first, rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(first - other))) > 1e-4


def test_weight_decay_spares_what_timm_spares(variables):
    decayed = optim.decayed(variables["params"], vit.NO_DECAY)
    assert not any(decayed[name] for name in ("pos_embed", "cls_token", "dist_token"))
    assert decayed["blocks_0"]["attn"]["qkv"]["kernel"] and decayed["head_dist"]["kernel"]


def test_module_works_in_nnx(images):
    linen = vit.build(**SMALL)
    module = bridge.lazy_init(bridge.ToNNX(linen, rngs=nnx.Rngs(0)), images[:1])
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    loss = lambda module: jnp.sum(module(images)[0] ** 2)
    expected = lambda params: jnp.sum(linen.apply({"params": params}, images)[0] ** 2)
    np.testing.assert_allclose(nnx.jit(loss)(module), jax.jit(expected)(params), rtol=1e-5)
    gradients = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(module)), jax.jit(jax.grad(expected))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *gradients)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_pool": "max"}, "neither 'token' nor 'avg'"),
        ({"class_token": False}, "needs class_token"),
        ({"distilled": True, "global_pool": "avg"}, "use global_pool='token'"),
    ],
)
def test_forms_that_do_not_exist_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        vit.build(**changes)


def test_images_of_another_size_are_refused(images):
    with pytest.raises(ValueError, match="24x16 .* built for 16x24"):
        traced(images, img_size=(16, 24))
