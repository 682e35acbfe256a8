"""Meshes and rules: where each array goes, and what is refused."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from research.core import sharding


def shapes():
    dense = {"kernel": jnp.zeros((64, 128)), "bias": jnp.zeros((128,))}
    return {"dense": dense, "odd": {"kernel": jnp.zeros((63, 129))}}


def specs(axes, rules, **options):
    placed = sharding.shardings(shapes(), sharding.mesh(axes), rules, **options)
    return jax.tree.map(lambda s: s.spec, placed)


def test_mesh_fills_the_free_axis():
    assert dict(sharding.mesh({"data": -1, "fsdp": 2}).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(sharding.mesh({"fsdp": 8}).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize(
    "axes, text", [({"data": 3}, "needs 3 devices, there are 8"), ({"dat": 8}, "unknown axis 'dat'")]
)
def test_mesh_refuses(axes, text):
    with pytest.raises(ValueError, match=text):
        sharding.mesh(axes)


def test_fsdp_splits_the_largest_dimension_that_divides():
    found = specs({"fsdp": 8}, [("kernel", "fsdp"), (".*", "replicate")])
    assert found["dense"]["kernel"] == P(None, "fsdp")
    assert found["dense"]["bias"] == P(None)
    assert found["odd"]["kernel"] == P()  # no dimension divides


def test_small_arrays_stay_whole_under_fsdp():
    assert specs({"fsdp": 8}, [(".*", "fsdp")], smallest=10**6)["dense"]["kernel"] == P(None, None)


def test_tensor_and_fsdp_take_different_dimensions():
    found = specs({"data": 1, "fsdp": 4, "tensor": 2}, [("kernel", "fsdp+tensor:-1")])
    assert found["dense"]["kernel"] == P("fsdp", "tensor")


def test_the_first_rule_wins():
    found = specs({"tensor": 8}, [("dense/kernel", "tensor:0"), ("kernel", "tensor:1")])
    assert found["dense"]["kernel"] == P("tensor", None)


def test_unknown_strategy_names_itself():
    with pytest.raises(ValueError, match="unknown strategy 'fdsp' for 'kernel'"):
        specs({"fsdp": 8}, [("kernel", "fdsp")])


def test_unmatched_and_indivisible_arrays_are_reported(caplog):
    with caplog.at_level("INFO", logger="research.core.sharding"):
        specs({"fsdp": 8}, [("kernel", "fsdp")], smallest=0)
    text = caplog.text
    assert "no rule matches dense/bias" in text
    assert "odd/kernel (63, 129) does not divide" in text
