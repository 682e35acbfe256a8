"""The map of names: inverse both ways, exact layouts, and loud where it does not fit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import backbones
from research.port import names
from tests.backbones import drawn

RULES = [(r"^block_(\d)", r"blocks.\1"), (r"grn\.weight$", "grn.gamma", lambda shape: (1, 1, 1, *shape))]
TREE = {
    "params": {
        "block_0": {"conv": {"kernel": (3, 5, 4, 6)}, "grn": {"scale": (6,)}},
        "fc": {"kernel": (6, 7), "bias": (7,)},
    },
    "batch_stats": {"bn": {"mean": (6,), "var": (6,)}},
}
SHAPES = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), TREE, is_leaf=lambda x: isinstance(x, tuple))
OFFICIAL = {
    "blocks.0.conv.weight": (6, 4, 3, 5),
    "blocks.0.grn.gamma": (1, 1, 1, 6),
    "fc.weight": (7, 6),
    "fc.bias": (7,),
    "bn.running_mean": (6,),
    "bn.running_var": (6,),
}


def state(**changes):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in OFFICIAL.items()}
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def test_names_and_layouts():
    official = state()
    ours = names.from_official(SHAPES, official, RULES)
    kernel = ours["params"]["block_0"]["conv"]["kernel"]
    assert kernel.shape == (3, 5, 4, 6)
    assert kernel[1, 2, 3, 4] == official["blocks.0.conv.weight"][4, 3, 1, 2]
    np.testing.assert_array_equal(ours["params"]["fc"]["kernel"], official["fc.weight"].T)
    np.testing.assert_array_equal(ours["params"]["block_0"]["grn"]["scale"], official["blocks.0.grn.gamma"].ravel())
    np.testing.assert_array_equal(ours["batch_stats"]["bn"]["var"], official["bn.running_var"])


def test_export_is_the_inverse_of_import():
    official = state()
    again = names.to_official(names.from_official(SHAPES, official, RULES), RULES)
    assert set(again) == set(official)
    for name, array in official.items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize(
    "name", ["resnet18d", "resnet10t", "convnext_atto", "convnextv2_atto", "wrn_16_2", "vgg13", "cifar_resnet18"]
)
def test_every_dialect_of_a_network_is_a_bijection(name):
    model, family = backbones.create(name), backbones.family(name)
    variables = drawn.variables(model, jnp.zeros((1, 32, 32, 3)))
    for rules in family.NAMES.values():
        official = names.to_official(variables, rules)
        assert len(official) == len(jax.tree.leaves(variables))
        again = names.from_official(variables, official, rules)
        jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_counters_of_batches_and_ignored_buffers_are_dropped():
    official = state(**{"bn.num_batches_tracked": np.int64(3), "index": np.zeros(4)})
    assert "index" not in names.to_official(names.from_official(SHAPES, official, RULES, ignore=["^index$"]), RULES)
    with pytest.raises(ValueError, match=r"1 unused.*\n.*index \(4,\)"):
        names.from_official(SHAPES, {k: np.asarray(v) for k, v in official.items()}, RULES)


def test_the_difference_lists_missing_unused_and_misshaped_names():
    wrong = state(**{"fc.bias": None, "extra": np.zeros(2), "bn.running_var": np.zeros(5)})
    with pytest.raises(ValueError) as caught:
        names.from_official(SHAPES, wrong, RULES)
    text = str(caught.value)
    assert "1 of 6 names missing, 1 unused, 1 of another shape" in text.splitlines()[0]
    for line in (r"fc\.bias \(7,\)", r"extra \(2,\)", r"bn\.running_var: \(5,\), expected \(6,\)"):
        assert re.search(line, text)


def test_a_transposed_matrix_is_refused():
    with pytest.raises(ValueError, match=r"fc\.weight: \(6, 7\), expected \(7, 6\)"):
        names.from_official(SHAPES, state(**{"fc.weight": np.zeros((6, 7))}), RULES)


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="both have the official name"):
        names.table(SHAPES, [(r"running_mean", "running_var")])


def test_dtypes_are_kept():
    official = {name: array.astype(np.float64) for name, array in state().items()}
    ours = names.from_official(SHAPES, official, RULES)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours)} == {np.dtype("float64")}
