"""ResNet's endpoints, training mode, scopes of batch norm, stochastic depth and rematerialisation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import resnet
from research.core import scope
from tests.backbones import drawn

SMALL = {"block": "basic", "layers": (1, 1), "channels": (4, 8), "num_classes": 5, "stem_type": "small"}
SMALL |= {"stem_width": 4, "zero_init_last": False}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (16, 8, 8, 3))


@pytest.fixture(scope="module")
def variables(images):
    return drawn.variables(resnet.build(**SMALL), images)


@pytest.fixture(scope="module")
def exact(variables, images):
    """Logits and endpoints in float32, in evaluation; op by op, as a compiler may round what it fuses twice apart."""
    return resnet.build(**SMALL).apply(variables, images)


def gradient(**changes):
    """Function (variables, images, key) -> ((loss, (logits, updates)), gradient) of the changed small network."""
    model = resnet.build(**SMALL, **changes)

    def loss(variables, images, key):
        options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": key}}
        (logits, _), updates = model.apply(variables, images, **options)
        return jnp.mean(jnp.square(logits)), (logits, updates)

    return jax.value_and_grad(loss, has_aux=True)


@pytest.fixture(scope="module")
def plain(variables, images):
    """What `gradient()` gives for the global batch."""
    return jax.jit(gradient())(variables, images, jax.random.key(0))


def assert_close(found, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), found, expected)


def test_endpoints_are_named_and_shaped(variables, images):
    model = resnet.build(**SMALL)
    logits, endpoints = jax.eval_shape(model.apply, variables, images)
    shapes = {key: value.shape[1:] for key, value in endpoints.items()}
    assert logits.shape == (16, 5)
    assert shapes == {
        **{key: (8, 8, 4) for key in ("stem", "stem_preact", "stage1", "stage1_preact")},
        **{key: (4, 4, 8) for key in ("stage2", "stage2_preact")},
        "pooled": (8,),
    }


def test_features_are_the_activated_preactivations(exact):
    _, endpoints = exact
    for name in ("stem", "stage1", "stage2"):
        np.testing.assert_array_equal(endpoints[name], np.maximum(endpoints[f"{name}_preact"], 0))
    np.testing.assert_allclose(endpoints["pooled"], np.mean(endpoints["stage2"], (1, 2)), rtol=1e-5, atol=1e-6)


def test_no_classes_means_pooled_features(variables, images, exact):
    bare = {"params": {k: v for k, v in variables["params"].items() if k != "fc"}}
    bare |= {"batch_stats": variables["batch_stats"]}
    logits, endpoints = jax.jit(resnet.build(**{**SMALL, "num_classes": 0}).apply)(bare, images)
    np.testing.assert_array_equal(logits, endpoints["pooled"])
    np.testing.assert_allclose(logits, exact[1]["pooled"], rtol=1e-5)


def test_initial_weights_follow_the_recipe():
    model = resnet.build(block="basic", layers=(1,), channels=(64,), num_classes=100, stem_type="small")
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    block = params["layer1_0"]
    assert not np.any(block["bn2"]["scale"])
    assert np.all(block["bn1"]["scale"] == 1)
    # Kaiming normal, fan-out: the deviation is sqrt(2 / (channels out * positions)).
    assert np.std(block["conv2"]["kernel"]) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    for name in ("kernel", "bias"):
        assert 0.9 / 8 < np.max(np.abs(params["fc"][name])) <= 1 / 8


@pytest.mark.parametrize("group", [None, 4])
def test_gradients_under_pmap_are_those_of_jit(variables, images, plain, group):
    def share(variables, images, key):
        with scope.batch_axis("data"):
            (loss, (_, updates)), grads = gradient(bn_group=group)(variables, images, key)
            return scope.mean((loss, updates, grads))

    key = jax.random.key(0)
    mapped = jax.pmap(share, "data", in_axes=(None, 0, None))
    found = jax.tree.map(lambda x: x[0], mapped(variables, images.reshape(8, 2, *images.shape[1:]), key))
    (loss, (_, updates)), grads = plain if group is None else jax.jit(gradient(bn_group=group))(variables, images, key)
    assert_close(found, (loss, updates, grads), rtol=2e-4, atol=2e-6)


def test_batch_norm_groups_see_only_themselves(variables, images, plain):
    model = resnet.build(**SMALL, bn_group=4)
    forward = jax.jit(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])[0][0])
    grouped = forward(images)
    np.testing.assert_allclose(forward(images[:4]), grouped[:4], atol=1e-5)
    _, (globally, _) = plain[0]
    assert float(jnp.max(jnp.abs(grouped - globally))) > 1e-2


def test_stochastic_depth_draws_per_example(variables, images):
    model = resnet.build(**SMALL, drop_path=0.5)

    @jax.jit
    def draw(key):
        one = jnp.broadcast_to(images[:1], images.shape)
        rngs = {"dropout": key}
        # Running statistics, so that equal examples only differ by what is dropped.
        return model.apply(variables, one, train=False), model.apply(
            variables, one, train=True, rngs=rngs, mutable=["batch_stats"]
        )[0]

    (kept, _), (first, _) = draw(jax.random.key(0))
    assert np.ptp(kept, axis=0).max() < 1e-5 < np.ptp(first, axis=0).max()
    np.testing.assert_array_equal(first, draw(jax.random.key(0))[1][0])
    assert float(jnp.max(jnp.abs(first - draw(jax.random.key(1))[1][0]))) > 1e-3


@pytest.mark.parametrize("remat", [True, "dots_saveable"])
def test_rematerialisation_changes_no_gradient(variables, images, plain, remat):
    found = jax.jit(gradient(remat=remat))(variables, images, jax.random.key(0))
    assert_close(found, plain, rtol=1e-4, atol=1e-6)


def test_rematerialisation_recomputes(variables, images):
    def convolutions(remat):
        text = str(jax.make_jaxpr(gradient(remat=remat))(variables, images, jax.random.key(0)))
        return text.count("conv_general_dilated[")

    assert convolutions(True) > convolutions(False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"block": "BasicBlock"}, "neither 'basic' nor 'bottleneck'"),
        ({"block": "basic", "base_width": 128}, "use block='bottleneck'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet.build(**arguments)


@pytest.mark.parametrize("arguments, message", [({"stem_type": "depe"}, "stem_type"), ({"remat": "all"}, "remat")])
def test_bad_arguments_of_the_forward_pass_are_refused(arguments, message, images):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(resnet.build(**{**SMALL, **arguments}).init, jax.random.key(0), images)
