"""ParameterNet: counts and names of every variant, experts an example. Its numbers are checked by tests/port."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.backbones import parameternet as recipe
from research import backbones
from research.backbones import parameternet
from research.core.errors import UserError
from research.layers import dynamic
from research.port import names

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "parameternet"
COUNTS = {name: entry for name, entry in json.loads((GOLDEN / "counts.json").read_text()).items() if entry["macs"]}
OURS = {"parameternet_300m_derived_experts4": "parameternet_300m"}
CFGS = (((3, 16, 16, 0, 1),), ((3, 48, 24, 0.25, 2), (3, 24, 24, 0, 1)))
SMALL = {"cfgs": CFGS, "width": 0.5, "num_experts": 2, "head": 16, "num_classes": 5, "drop_rate": 0.0}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, 20, 24, 3))


@pytest.fixture(scope="module")
def variables(images):
    variables = jax.jit(parameternet.build(**SMALL).init)(jax.random.key(0), images[:1])
    # Routing that differs from example to example.
    return jax.tree_util.tree_map_with_path(lambda path, x: 4 * x if "routing" in str(path) else x, variables)


@pytest.fixture(scope="module")
def exact(variables, images):
    return jax.jit(parameternet.build(**SMALL).apply)(variables, images)


@pytest.mark.parametrize("entry", COUNTS)
def test_counts_are_exact(entry):
    name = OURS.get(entry, entry.replace("_static", "").replace("_derived", ""))
    expected = COUNTS[entry]
    found = parameternet.paper_flops(backbones.create(name), expected["image_size"])
    assert (found["params"], found["macs"]) == (expected["params"], expected["macs"])
    assert found["flops"] == expected.get("macs_plus_pool_reads", found["flops"])


def test_names_and_shapes_are_the_official_ones():
    official = json.loads((GOLDEN / "state_dict_shapes_600m.json").read_text())
    model, image = backbones.create("parameternet_600m"), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes, rules = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image), parameternet.NAMES["official"]
    ours = names.table(shapes, rules)
    assert set(ours) == {name for name in official if not name.endswith("num_batches_tracked")}
    for name, path in ours.items():
        leaf = shapes
        for part in path:
            leaf = leaf[part]
        assert names.official(path, rules)[1](names.official_shape(path, leaf.shape)) == tuple(official[name])


@pytest.mark.parametrize(
    "inputs, features, side, stride, groups", [(6, 5, 1, 1, 1), (3, 4, 3, 2, 1), (6, 6, 5, 2, 6), (6, 4, 3, 1, 2)]
)
def test_mixed_kernels_are_mixed_maps(inputs, features, side, stride, groups):
    """The other order: every expert convolves every example, and the maps are mixed (M times the work)."""
    module = dynamic.DynamicConv(features, side, stride, groups=groups, num_experts=3)
    x = jax.random.normal(jax.random.key(0), (4, 9, 8, inputs))
    variables = jax.jit(module.init)(jax.random.key(1), x)
    routing = variables["params"]["routing"]
    weights = jax.nn.sigmoid(5 * (jnp.mean(x, (1, 2)) @ routing["kernel"]) + routing["bias"][None])
    variables["params"]["routing"]["kernel"] = 5 * routing["kernel"]
    experts = variables["params"]["cond_conv"]["weight"].reshape(3, features, inputs // groups, side, side)
    maps = [
        jax.lax.conv_general_dilated(
            x,
            jnp.transpose(expert, (2, 3, 1, 0)),
            (stride, stride),
            ((side // 2, side // 2),) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        for expert in experts
    ]
    expected = jnp.einsum("bm,mbhwo->bhwo", weights, jnp.stack(maps))
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_kernels_that_do_not_fit_the_channels_are_refused():
    with pytest.raises(ValueError, match="5 channels do not fit kernels of 2 inputs"):
        dynamic.mixed_conv(jnp.zeros((1, 4, 4, 5)), jnp.zeros((1, 4, 2, 1, 1)))


def test_examples_do_not_share_kernels(variables, images, exact):
    model = parameternet.build(**SMALL)
    alone = jnp.concatenate([jax.jit(model.apply)(variables, images[i : i + 1])[0] for i in range(2)])
    np.testing.assert_allclose(alone, exact[0][:2], rtol=1e-4, atol=1e-5)


def test_endpoints_are_named_and_shaped(exact):
    assert {name: value.shape[1:] for name, value in exact[1].items()} == {
        "stem": (10, 12, 8),
        "block01": (10, 12, 8),
        "block02": (5, 6, 12),
        "stage1": (5, 6, 12),
        "features": (5, 6, 12),
        "pooled": (16,),
    }


def test_bfloat16_routes_in_float32(variables, images, exact):
    model = parameternet.build(**SMALL, dtype=jnp.bfloat16)
    logits, endpoints = jax.jit(model.apply)(variables, images)
    assert {x.dtype for x in jax.tree.leaves((logits, endpoints))} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(logits.astype(jnp.float32), exact[0], atol=0.05 * float(jnp.max(jnp.abs(exact[0]))))


def test_an_unknown_activation_is_refused(images):
    with pytest.raises(ValueError, match="act: 'swish' is none of relu"):
        jax.eval_shape(parameternet.build(**SMALL, act="swish").init, jax.random.key(0), images)


def test_the_recipe_compares_experts_with_plain_convolutions():
    c = recipe.get_config("variant=parameternet_300m")
    assert {name: s.options.get("num_experts", 4) for name, s in c.students.items()} == {"dynamic": 4, "static": 0}
    assert {s.model for s in c.students.values()} == {"parameternet_300m"}
    with pytest.raises(UserError, match="no arm 'dynamo'; there are dynamic, static"):
        recipe.get_config("arms=dynamo")
