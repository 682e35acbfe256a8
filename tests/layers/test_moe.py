"""The layer with experts: each token its own, in order, at the work of one. Its numbers are checked by tests/port."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import sharding
from research.core.cost import macs
from research.layers import moe


@pytest.fixture(scope="module")
def layer():
    module = moe.SwitchDense(5, num_experts=3, std=1.0)
    x = jax.random.normal(jax.random.key(0), (8, 4, 6))
    return module, jax.jit(module.init)(jax.random.key(1), x), x


def test_every_token_has_its_own_expert(layer):
    module, variables, x = layer
    out, logits = jax.jit(module.apply)(variables, x)
    expert, probability = moe.route(logits)
    assert len(np.unique(expert)) == 3
    kernel, bias = (np.asarray(variables["params"]["experts"][name]) for name in ("kernel", "bias"))
    for where in np.ndindex(8, 4):
        k = int(expert[where])
        expected = float(probability[where]) * (np.asarray(x[where]) @ kernel[k] + bias[k])
        np.testing.assert_allclose(out[where], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert", [[0, 0, 0, 0], [2, 0, 2, 0]])
def test_experts_without_tokens_are_left_out(expert):
    rng = np.random.default_rng(0)
    x, kernel, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 6), (3, 6, 5), (3, 5)))
    found = jax.jit(moe.dispatch)(x, jnp.asarray(expert, jnp.int32), kernel, bias)
    np.testing.assert_allclose(
        found, np.einsum("ti,tio->to", x, kernel[np.array(expert)]) + bias[np.array(expert)], 1e-5
    )


def test_the_work_is_that_of_one_expert(layer):
    module, variables, x = layer
    assert macs(lambda x: module.apply(variables, x), x) == 32 * 6 * (5 + 3)


def test_balance_is_one_where_even_and_the_count_where_all_go_to_one():
    even = 1e-3 * jnp.tile(jnp.eye(4), (2, 3, 1))
    assert float(moe.load_balancing_loss(even)) == pytest.approx(1.0, rel=1e-3)
    one = jnp.zeros((2, 8, 4)).at[..., 1].set(50.0)
    assert float(moe.load_balancing_loss(one)) == pytest.approx(4.0)
    assert float(moe.load_balancing_loss(one.astype(jnp.bfloat16))) == pytest.approx(4.0)


def test_official_experts_are_stacked_and_unstacked():
    rng = np.random.default_rng(0)
    shapes = {"weight": (3, 2), "bias": (3,)}
    state = {f"a.experts.expert_{k}.{leaf}": rng.normal(size=s) for k in range(11) for leaf, s in shapes.items()}
    state["a.router.classifier.weight"] = np.ones(2)
    stacked = moe.stack_experts(state)
    assert {name: array.shape for name, array in stacked.items()} == {
        "a.router.classifier.weight": (2,),
        "a.experts.weight": (3, 2, 11),
        "a.experts.bias": (11, 3),
    }
    back = moe.unstack_experts(stacked)
    assert set(back) == set(state)
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array)


def test_gradients_under_fsdp_and_in_bfloat16(layer):
    module, variables, x = layer
    gradient = jax.jit(jax.grad(lambda v, x: jnp.sum(module.apply(v, x)[0] ** 2)))
    alone = gradient(variables, x)
    mesh = sharding.mesh({"data": 4, "fsdp": 2})
    placed = jax.device_put(variables, sharding.shardings(variables, mesh, [(".*", "fsdp")], smallest=1))
    split = gradient(placed, jax.device_put(x, sharding.batch_sharding(mesh)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), split, alone)
    narrow, logits = jax.jit(moe.SwitchDense(5, num_experts=3, std=1.0, dtype=jnp.bfloat16).apply)(variables, x)
    assert (narrow.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    exact = jax.jit(module.apply)(variables, x)[0]
    np.testing.assert_allclose(narrow.astype(jnp.float32), exact, atol=0.03 * float(jnp.max(jnp.abs(exact))))
