"""VanillaNet: counts and names of every variant, the slope, and the merge. Its numbers are checked by tests/port."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.backbones import vanillanet as recipe
from research import backbones
from research.backbones import vanillanet
from research.core import optim
from research.port import names
from tests.backbones import drawn
from tests.backbones.test_counts import measured

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "vanillanet"
COUNTS = json.loads((GOLDEN / "counts.json").read_text())
TRAIN = [name for name in vanillanet.VARIANTS if not name.endswith("_deploy")]
SMALL = {"dims": (8, 12, 16), "strides": (2, 1), "act_num": 1, "num_classes": 5}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, 20, 24, 3))


@pytest.fixture(scope="module")
def variables(images):
    return drawn.variables(vanillanet.build(**SMALL), images)


def at(variables, slope) -> dict:
    return {**variables, "schedule": {"slope": jnp.float32(slope)}}


@pytest.mark.parametrize("entry", COUNTS)
def test_counts_are_exact(entry):
    name = entry.removesuffix("_train")
    assert measured(name, COUNTS[entry]["image_size"])[:2] == (COUNTS[entry]["params"], COUNTS[entry]["macs"])


def test_names_and_shapes_are_the_official_ones():
    for entry, official in json.loads((GOLDEN / "state_dict_shapes.json").read_text()).items():
        model = backbones.create(entry.removesuffix("_train"))
        image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        shapes = jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x), image)
        ours = names.table(shapes, vanillanet.NAMES["official"])
        assert set(ours) == {name for name in official if not name.endswith("num_batches_tracked")}
        for name, path in ours.items():
            leaf = shapes
            for part in path:
                leaf = leaf[part]
            _, reshape = names.official(path, vanillanet.NAMES["official"])
            assert reshape(names.official_shape(path, leaf.shape)) == tuple(official[name])


@pytest.mark.parametrize("name", TRAIN)
def test_the_merged_network_is_the_trained_one_at_slope_one(name):
    published = vanillanet.VARIANTS[name]
    small = {**published, "dims": tuple(width // 128 for width in published["dims"]), "num_classes": 5}
    small |= {"ada_pool": tuple((side + 3) // 4 for side in published.get("ada_pool", ()))}
    model, deploy = vanillanet.build(**small), vanillanet.build(**small, deploy=True)
    image = jax.random.normal(jax.random.key(0), (2, 48, 40, 3))
    variables = drawn.variables(model, image)
    both = jax.jit(lambda v, x: (model.apply(v, x)[0], deploy.apply(vanillanet.merge(v), x)[0]))
    trained, merged = both(variables, image)
    assert float(jnp.max(jnp.abs(trained - merged))) <= 1e-5 * float(jnp.max(jnp.abs(trained)))
    wanted = jax.eval_shape(lambda x: deploy.init(jax.random.key(0), x), image)
    found = jax.eval_shape(vanillanet.merge, variables)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, dict(wanted))


def test_merging_keeps_no_classifier_where_there_is_none_and_refuses_the_merged(images, variables):
    body = {kind: {k: v for k, v in variables[kind].items() if k[:3] != "cls"} for kind in variables}
    merged = vanillanet.merge(body)
    assert "cls_2" not in merged["params"]
    with pytest.raises(ValueError, match="train form"):
        vanillanet.merge(merged)


def test_the_slope_turns_the_leaky_relu_from_rectifier_to_identity(images, variables):
    apply = jax.jit(vanillanet.build(**SMALL).apply)
    linear, _ = apply(variables, images)
    np.testing.assert_allclose(apply(at(variables, 1.0), images)[0], linear, rtol=1e-5, atol=1e-6)
    found = [apply(at(variables, slope), images)[0] for slope in (0.0, 0.5, 0.999999)]
    assert all(float(jnp.max(jnp.abs(a - linear))) > 1e-2 for a in found[:2])
    np.testing.assert_allclose(found[2], linear, atol=1e-3 * float(jnp.max(jnp.abs(linear))))
    x = jnp.linspace(-2, 2, 9)
    mixed = 0.75 * np.maximum(x, 0) + 0.25 * x
    np.testing.assert_allclose(vanillanet._leaky(x, jnp.float32(0.25)), mixed, rtol=1e-6)


def test_slopes_of_epochs():
    slope = lambda curve, step: float(vanillanet.slope(step, steps_per_epoch=10, decay_epochs=4, curve=curve))
    assert [slope("linear", step) for step in (0, 9, 10, 35, 40, 99)] == [0, 0, 0.25, 0.75, 1, 1]
    expected = [0, (1 - 0.5**0.5) / 2, 0.5, 1]
    np.testing.assert_allclose([slope("cosine", step) for step in (0, 10, 20, 40)], expected, atol=1e-6)
    assert float(vanillanet.slope(0, steps_per_epoch=10, decay_epochs=0)) == 1.0
    with pytest.raises(ValueError, match="curve: 'square'"):
        slope("square", 0)


def test_one_program_serves_all_slopes(images, variables):
    model = vanillanet.build(**SMALL, drop_rate=0.1)
    apply = lambda v, train, **options: model.apply(v, images, train, **options)
    evaluate = jax.jit(lambda v: apply(v, False)[0])
    loss = lambda v, key: jnp.sum(apply(v, True, rngs={"dropout": key}, mutable=["batch_stats"])[0][0] ** 2)
    train = jax.jit(jax.grad(lambda p, v, key: loss({**v, "params": p}, key)))
    for step in range(3):
        v = at(variables, vanillanet.slope(step, steps_per_epoch=1, decay_epochs=2))
        grads = train(v["params"], v, jax.random.key(step))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((grads, evaluate(v))))
    assert train._cache_size() == evaluate._cache_size() == 1


def test_endpoints_are_named_and_shaped(images):
    model = vanillanet.build(**{**SMALL, "dims": (8, 8, 12, 16), "strides": (1, 2, 1)})
    logits, endpoints = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], images)
    assert logits.shape == (8, 5)
    assert {name: value.shape[1:] for name, value in endpoints.items()} == {
        "stem": (5, 6, 8),
        "stage1": (5, 6, 8),
        "block01": (5, 6, 8),
        "block02": (2, 3, 12),
        "stage2": (2, 3, 16),
        "block03": (2, 3, 16),
        "pooled": (16,),
    }


@pytest.mark.parametrize(
    "changes, size, message",
    [
        ({}, (3, 9), "images of 3x9 are smaller"),
        ({"strides": (2, 2)}, (8, 8), "a 1x1 map is left to pool by 2"),
        ({"strides": (2,)}, (16, 16), "dims: 3 widths do not fit 1 strides"),
        ({"ada_pool": (2,)}, (16, 16), "ada_pool: 1 sides do not fit 2 strides"),
    ],
)
def test_what_cannot_be_is_refused(changes, size, message):
    model = vanillanet.build(**{**SMALL, **changes})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))


def test_without_classes_the_logits_are_the_pooled_features(images):
    model = vanillanet.build(**{**SMALL, "num_classes": 0})
    (logits, endpoints), shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)
    assert logits.shape == endpoints["pooled"].shape == (8, 16)
    assert not any(name.startswith("cls") for name in shapes["params"])


def test_layers_of_the_layer_decay():
    scale = recipe.get_config("variant=vanillanet_6").optimizer.options.lr_scale
    factor = optim.layer_decay(**scale)
    paths = ["model/stem1_0/kernel", "model/stages_0/act/kernel", "model/stages_3/conv1_0/bias", "model/cls1_2/kernel"]
    assert [factor(path) for path in paths] == pytest.approx([0.8**5, 0.8**4, 0.8, 1.0])
    tx = optim.optimizer("sgd", 1.0, lr_scale=scale)
    params = {"stem1_0": np.ones(2, np.float32)}
    np.testing.assert_allclose(tx.update(params, tx.init(params), params)[0]["stem1_0"], -(0.8**5), rtol=1e-6)
