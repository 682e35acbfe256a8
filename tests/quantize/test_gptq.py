"""GPTQ against the official algorithm, column by column in NumPy, and against rounding to nearest.

Weights here are (K, N), inputs first; golden arrays of the official code are checked in `tests/port/test_verify.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from research.quantize import grids
from research.quantize.gptq import add, gptq, output_error, second_moment
from research.quantize.grids import Form
from research.quantize.quantized import dequantize, quantize

K, N = 24, 8
RNG = np.random.default_rng(0)
W = RNG.normal(size=(K, N)).astype(np.float32)
# Inputs of very different size that share a few causes.
X = (RNG.normal(size=(2, 96, 6)) @ RNG.normal(size=(6, K)) + RNG.normal(size=(2, 96, K))).astype(np.float32)
X = X * RNG.uniform(0.2, 3, K).astype(np.float32)
MOMENT = add(second_moment(K), jnp.asarray(X))


def diagonal():
    """The moment of inputs that have nothing to do with each other, no two of the same size."""
    return MOMENT._replace(hessian=jnp.diag(jnp.asarray(RNG.permutation(K) + 1, jnp.float32)))


def fitted(w, bits):
    """(scales, zero points) of columns (inputs, N) by the rule "gptq", (N,) each."""
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    low, high = np.where((low == 0) & (high == 0), -1, low), np.where((low == 0) & (high == 0), 1, high)
    scales = (high - low) / (2**bits - 1)
    return scales, np.round(-low / scales)


def official(w, hessian, bits, group, block, act_order, static_groups):
    """What the official code computes, as it does: lazy blocks, and groups fitted to what is known at their start."""
    w, hessian = w.astype(np.float64), hessian.astype(np.float64)
    grid = fitted(w, bits)
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    w[dead] = 0
    size = group or len(w)
    static = [fitted(w[i : i + size], bits) for i in range(0, len(w), size)]
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(w))
    w, hessian = w[order], hessian[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(len(w)))).T
    rounded = np.zeros_like(w)
    for begin in range(0, len(w), block):
        end = min(begin + block, len(w))
        waiting, errors = w[begin:end].copy(), np.zeros((end - begin, w.shape[1]))
        for i in range(begin, end):
            if group and static_groups:
                grid = static[order[i] // group]
            elif group and i % group == 0:
                grid = fitted(w[i : i + group], bits)
            scales, zeros = grid
            rounded[i] = scales * (np.clip(np.round(waiting[i - begin] / scales) + zeros, 0, 2**bits - 1) - zeros)
            errors[i - begin] = (waiting[i - begin] - rounded[i]) / upper[i, i]
            waiting -= np.outer(upper[i, begin:end], errors[i - begin])
        w[end:] -= upper[begin:end, end:].T @ errors
    return rounded[np.argsort(order)]


@pytest.mark.parametrize(
    ("group", "block", "act_order", "static_groups"),
    [
        (None, 7, True, False),
        (8, 128, True, False),  # groups within a block
        (5, 6, True, False),  # neither divides the other, and the last group is not full
        (10, 4, False, False),  # groups of several blocks
        (5, 6, True, True),
    ],
)
def test_it_is_the_official_algorithm_with_dead_inputs_too(group, block, act_order, static_groups):
    dead = np.array(X, np.float64)
    dead[..., [3, 17]] = 0
    with jax.enable_x64(True):
        moment = add(second_moment(K, jnp.float64), jnp.asarray(dead))
        settings = {"block": block, "act_order": act_order, "static_groups": static_groups}
        q, error, _ = gptq(jnp.asarray(W, jnp.float64), moment, Form(3, group=group, pad=True), **settings)
        found = np.asarray(dequantize(q))
    expected = official(W, np.array(moment.hessian), 3, group, block, act_order, static_groups)
    assert (q.order is None) == (not act_order or static_groups or group is None)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    outputs = dead.reshape(-1, K) @ (expected - W)
    np.testing.assert_allclose(error, np.sum(outputs**2), rtol=1e-9)  # 2 / samples = 1


@pytest.mark.parametrize("form", [Form(3), Form(2, group=8, rule="gptq_symmetric_mse")], ids=["channels", "groups"])
def test_outputs_are_nearer_than_by_rounding_to_nearest(form):
    _, error, _ = gptq(jnp.asarray(W), MOMENT, form, act_order=True)
    nearest = output_error(MOMENT.hessian, dequantize(quantize(jnp.asarray(W), form)) - W)
    assert error < 0.7 * nearest


def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest():
    moment, w = diagonal(), jnp.asarray(W)
    for form in (Form(3), Form(4, group=8), Form(4, per_tensor=True, rule="absmax")):
        q = gptq(w, moment, form, block=10).weight
        expected = quantize(w, form)
        np.testing.assert_array_equal(q.codes, expected.codes)
        np.testing.assert_array_equal(dequantize(q), dequantize(expected))


def test_the_order_of_inputs_is_undone():
    moment, w = diagonal(), jnp.asarray(W)
    order = np.argsort(-np.diag(moment.hessian))
    q = gptq(w, moment, Form(4, group=8), act_order=True).weight
    np.testing.assert_array_equal(q.order, order)
    np.testing.assert_array_equal(dequantize(q)[order], dequantize(quantize(w[order], Form(4, group=8))))
    q = gptq(w, moment, Form(4, group=8), act_order=True, static_groups=True).weight
    assert q.order is None
    np.testing.assert_array_equal(dequantize(q), dequantize(quantize(w, Form(4, group=8))))


def test_the_moment_is_that_of_all_batches():
    step = jax.jit(add)
    moment = second_moment(K)
    for x in (X[:, :50, None], X[:1], X):
        moment = step(moment, jnp.asarray(x))
    rows = np.concatenate([x.reshape(-1, K) for x in (X[:, :50], X[:1], X)]).astype(np.float64)
    assert moment.samples == 5
    np.testing.assert_allclose(moment.hessian, rows.T @ rows * 2 / 5, rtol=1e-5, atol=1e-3)
    half = step(second_moment(K), jnp.asarray(X[0], jnp.bfloat16))
    assert (half.samples, half.hessian.dtype) == (1, jnp.float32)
    rows = np.asarray(jnp.asarray(X[0], jnp.bfloat16), np.float64)
    np.testing.assert_allclose(half.hessian, rows.T @ rows * 2, rtol=1e-5, atol=1e-3)


def test_outputs_may_lie_on_many_devices():
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    w = jax.device_put(W, NamedSharding(mesh, PartitionSpec(None, "tensor")))
    moment = jax.device_put(MOMENT, NamedSharding(mesh, PartitionSpec()))
    found, expected = (gptq(w, m, Form(3), act_order=True)[0] for w, m in ((w, moment), (jnp.asarray(W), MOMENT)))
    np.testing.assert_array_equal(found.codes, expected.codes)


def test_what_cannot_be_calibrated_is_refused():
    w, form = jnp.asarray(W), Form(4)
    with pytest.raises(
        ValueError, match=r"a form along axis 0 and a Hessian \(K, K\), not \(23, 8\), 0 and \(24, 24\)"
    ):
        gptq(w[1:], MOMENT, form)
    with pytest.raises(ValueError, match="no calibration data"):
        gptq(w, second_moment(K), form)
    with pytest.raises(ValueError, match="NaN or infinite activations"):
        gptq(w, add(MOMENT, jnp.full((1, K), jnp.nan)), form)
    with pytest.raises(ValueError, match="not positive definite with damping=0: raise it"):
        gptq(w, MOMENT._replace(hessian=-MOMENT.hessian), form, damping=0.0)
    with pytest.raises(ValueError, match="block: 0"):
        gptq(w, MOMENT, form, block=0)
    with pytest.raises(ValueError, match="group: 7 does not divide the 24"):
        gptq(w, MOMENT, Form(4, group=7))


def test_weights_that_lie_on_the_grid_stay():
    w = dequantize(quantize(jnp.asarray(W), Form(4)))
    q, error, _ = gptq(w, MOMENT, Form(4))
    assert error < 1e-6 * output_error(MOMENT.hessian, w)
    np.testing.assert_array_equal(q.codes, grids.nearest(w, grids.fit(w, Form(4)), 4))
