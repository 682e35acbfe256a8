"""Optimisers against the golden LAMB, optax's own, and formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import optim
from research.port import verify

PARAMS = {
    "stem": {"kernel": np.ones((3, 3, 3, 4), np.float32), "bias": np.full(4, 0.5, np.float32)},
    "block1": {
        "attn": {"kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)},
        "norm": {"scale": np.ones(3, np.float32)},
    },
    "pos_embed": np.full((1, 5, 3), 0.1, np.float32),
}


def grads(step: int):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def run(tx, steps: int = 4, scale: float = 1.0):
    """Parameters after a few jitted steps."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(jax.tree.map(lambda g: g * scale, grads(step)), state, params)
        params = optax.apply_updates(params, updates)
    return params


def close(a, b, rtol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


def norm(tree) -> float:
    return float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))))


def test_golden_lamb(golden):
    with jax.enable_x64(True):
        passed, line = verify.check(golden / "vanillakd" / "lamb.npz")
    assert passed, line


def test_mask_follows_timm():
    assert optim.decayed(PARAMS, no_decay=("^pos_embed$",)) == {
        "stem": {"kernel": True, "bias": False},
        "block1": {"attn": {"kernel": True}, "norm": {"scale": False}},
        "pos_embed": False,
    }
    assert optim.decayed(PARAMS)["pos_embed"]
    assert not optim.decayed({"proj": {"bias": np.ones((2, 3))}})["proj"]["bias"]  # a bias of several axes
    assert optim.decayed(PARAMS, decay_anyway=("norm/scale",))["block1"]["norm"]["scale"]


def test_adamw_is_optaxs():
    mask = optim.decayed(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        expected = run(optax.adamw(1e-2, weight_decay=0.1, mask=mask))
    close(run(optim.optimizer("adamw", 1e-2, weight_decay=0.1)), expected)


@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_sgd_is_pytorchs(name):
    """PyTorch's update written out: the decay joins the gradient before the momentum buffer."""
    lr, momentum, decay = 0.1, 0.8, 0.05
    mask = jax.tree.map(float, optim.decayed(PARAMS))
    params, buffer = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    for step in range(4):
        d = jax.tree.map(lambda g, p, m: g + decay * p * m, grads(step), params, mask)
        buffer = jax.tree.map(lambda b, d: momentum * b + d, buffer, d)
        d = jax.tree.map(lambda d, b: d + momentum * b, d, buffer) if name == "nesterov" else buffer
        params = jax.tree.map(lambda p, d: p - lr * d, params, d)
    close(run(optim.optimizer(name, lr, momentum=momentum, weight_decay=decay)), params)


def test_lamb_adapts_where_it_decays_only():
    """One step from rest: Adam's update is the sign of the gradient, so the trust ratio can be read off."""
    tx = optim.optimizer("lamb", 1.0, weight_decay=1e-12, eps=1e-12)
    updates, _ = tx.update(grads(0), tx.init(PARAMS), PARAMS)
    kernel, bias = updates["stem"]["kernel"], updates["stem"]["bias"]
    assert norm(kernel) == pytest.approx(norm(PARAMS["stem"]["kernel"]), rel=1e-4)
    assert norm(bias) == pytest.approx(2.0, rel=1e-4)  # four entries of size one, not adapted
    free = optim.optimizer("lamb", 1.0, eps=1e-12)
    updates, _ = free.update(grads(0), free.init(PARAMS), PARAMS)
    np.testing.assert_allclose(jnp.abs(updates["stem"]["kernel"]), 1.0, rtol=1e-4)  # no decay, no adaptation


def test_lamb_ignores_the_scale_of_large_gradients():
    tx = optim.optimizer("lamb", 0.1, weight_decay=0.02)
    close(run(tx, scale=10.0), run(tx, scale=1000.0), rtol=1e-5)
    free = optim.optimizer("lamb", 0.1, weight_decay=0.02, max_grad_norm=0.0, eps=1.0)
    assert abs(norm(run(free, scale=10.0)) - norm(run(free, scale=1000.0))) > 1e-3


def test_clip_bounds_the_global_norm():
    tx = optim.optimizer("sgd", 1.0, momentum=0.0, clip=0.5)
    for scale, expected in ((100.0, 0.5), (1e-3, 1e-3 * norm(grads(0)))):
        updates, _ = tx.update(jax.tree.map(lambda g, s=scale: s * g, grads(0)), tx.init(PARAMS), PARAMS)
        assert norm(updates) == pytest.approx(expected, rel=1e-5)


def test_layer_decay():
    factor = optim.layer_decay(0.5, ((r"^(?:stem|pos_embed)", 0), (r"^block(\d+)/", 1)), layers=4)
    assert [factor(path) for path in ("stem/kernel", "pos_embed", "block1/attn/kernel", "block2/x", "head/kernel")] == [
        1 / 16,
        1 / 16,
        1 / 4,
        1 / 2,
        1.0,
    ]
    tx, plain = optim.optimizer("adamw", 0.1, lr_scale=factor), optim.optimizer("adamw", 0.1)
    scaled, whole = (t.update(grads(0), t.init(PARAMS), PARAMS)[0] for t in (tx, plain))
    close(scaled["block1"], jax.tree.map(lambda u: u / 4, whole["block1"]))
    close(scaled["stem"], jax.tree.map(lambda u: u / 16, whole["stem"]))


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "lamb"])
def test_rate_is_a_function_of_the_step_and_state_is_arrays(name):
    tx = optim.optimizer(name, lambda step: jnp.where(step < 2, 0.0, 0.1), weight_decay=0.01)
    close(run(tx, steps=2), PARAMS)
    assert norm(jax.tree.map(jnp.subtract, run(tx, steps=3), PARAMS)) > 1e-3
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tx.init(PARAMS)))


def test_sharding_changes_nothing():
    tx = optim.optimizer("lamb", 0.1, weight_decay=0.02)
    expected = run(tx, steps=2)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda a: jax.device_put(a, jax.NamedSharding(mesh, jax.P(*("x" if d % 4 == 0 else None for d in a.shape))))
    params = jax.tree.map(place, PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(2):
        updates, state = update(jax.tree.map(place, grads(step)), state, params)
        params = optax.apply_updates(params, updates)
    close(params, expected, rtol=2e-6)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="'adamv'.*adamw"):
        optim.optimizer("adamv", 0.1)
    with pytest.raises(TypeError, match="momentun"):
        optim.optimizer("sgd", 0.1, momentun=0.9)


def test_ema():
    ema = {"w": jnp.asarray([1.0, 2.0], jnp.bfloat16), "count": jnp.asarray(3)}
    new = {"w": jnp.asarray([3.0, 2.0], jnp.bfloat16), "count": jnp.asarray(4)}
    found = optim.ema_update(ema, new, 0.75)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["w"].astype(jnp.float32), [1.5, 2.0])
    assert found["count"] == 4


def test_groups_have_rates_and_starts_of_their_own():
    groups = ((r"^block1/norm", 0.0, 0), (r"^block1/", 1.0, 0), (r"^(?!pos_embed)", 0.25, 2))
    whole, grouped = (optim.optimizer("adamw", 0.1, weight_decay=0.1, groups=g) for g in ((), groups))
    states, update = [whole.init(PARAMS), grouped.init(PARAMS)], (jax.jit(whole.update), jax.jit(grouped.update))
    for step in range(4):
        # The same parameters for both, so that what they decay is equal.
        expected, states[0] = update[0](grads(step), states[0], PARAMS)
        found, states[1] = update[1](grads(step), states[1], PARAMS)
        factors = {"stem": 0.25 * (step >= 2), "pos_embed": 1.0}
        factors = jax.tree.map(lambda _: 1.0, PARAMS) | factors
        factors["stem"] = jax.tree.map(lambda _, f=factors["stem"]: f, PARAMS["stem"])
        factors["block1"]["norm"]["scale"] = 0.0
        close(found, jax.tree.map(lambda u, f: u * f, expected, factors))
