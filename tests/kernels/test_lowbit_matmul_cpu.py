"""The form of `lowbit_matmul` for CPUs against its reference: a few tokens in one loop, many by tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.lowbit_matmul import Packed, cpu, lowbit_matmul, pack_codes, reference
from research.quantize.grids import Form
from research.quantize.quantized import pack, quantize


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "m,k,n,form,activations",
    [
        (1, 512, 24, Form(4, group=128), None),
        (3, 300, 7, Form(3, rule="awq"), None),  # filled-up rows, blocks of 64
        (2, 40, 1, Form(2, group=16, pad=True), 8),  # more rows than groups fill
        (2, 288, 5, Form(8, group=96, rule="absmax", pad=True), 8),
        (1, 96, 5, Form(1, rule="sign"), None),
        (1, 70, 3, Form(4, per_tensor=True), 4),
        (9, 257, 6, Form(8), None),
        (9, 512, 12, Form(4, group=64, rule="omniquant_symmetric"), 8),
        (9, 288, 8200, Form(3, group=96, pad=True), None),  # columns in parts, tiles smaller than groups
        (2, 64, 4, Form(4, group=16), None),  # groups too small for the fused loop
    ],
    ids=str,
)
def test_products_are_the_references(m, k, n, form, activations):
    x, w, bias = drawn(m, m, k), drawn(k, k, n), drawn(n, n)

    @jax.jit
    def run(x, w, bias):
        weight = pack(quantize(w, form))
        assert cpu.refusal(x, weight, activations) is None
        few = reference.weight_only if activations is None else _integers
        return cpu.product(x, weight, bias, activations), few(x, weight) + bias[None]

    def _integers(x, weight):
        return reference.integers(reference.quantize_tokens(x, activations), weight)

    found, expected = run(x, w, bias)
    np.testing.assert_allclose(found, expected, atol=2e-6 * k**0.5 * np.abs(expected).max())


@pytest.mark.parametrize("m", [1, cpu.FEW + 1])
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_exact(m, bits):
    """With scales of 1: the largest magnitude of 127 is that of the codes."""
    draw, k, n = np.random.default_rng(bits), 512, 6
    x, codes = draw.integers(-127, 128, (m, k)), draw.integers(0, 2**bits, (k, n))
    x[:, 5] = 127
    zeros = draw.integers(0, 2**bits, (2, n))
    planes = pack_codes(jnp.asarray(codes), bits)
    grid = jnp.ones((2, n)), jnp.asarray(zeros, jnp.float32)
    weight = Packed(planes, *grid, None, bits, k // 2, k)
    found = jax.jit(lambda x, weight: cpu.product(x, weight, None, 8))(jnp.asarray(x, jnp.float32), weight)
    np.testing.assert_array_equal(found, x @ (codes - np.repeat(zeros, k // 2, axis=0)))


def test_no_more_than_a_tile_is_in_real_numbers():
    k, n = 2048, 8192
    weight = jax.eval_shape(lambda w: pack(quantize(w, Form(4, group=128))), jax.ShapeDtypeStruct((k, n), jnp.float32))
    x = jax.ShapeDtypeStruct((16, k), jnp.float32)
    compiled = jax.jit(lambda x, weight: cpu.product(x, weight, None, None)).lower(x, weight).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * k * n / 4


def test_groups_that_do_not_fit_blocks_are_left_to_the_reference():
    @jax.jit
    def run(x, w):
        weight = pack(quantize(w, Form(4, group=30)))
        assert cpu.refusal(x, weight, None) == "groups of 30 inputs and blocks of 32 do not divide one another"
        return lowbit_matmul(x, weight, form="kernel"), reference.weight_only(x, weight)

    np.testing.assert_allclose(*run(drawn(0, 2, 90), drawn(1, 90, 4)), atol=1e-5)


def test_programs_for_cpus_take_it():
    order = jnp.asarray(np.random.default_rng(2).permutation(64), jnp.int32)

    def run(x, w, form):
        weight = pack(quantize(w, Form(4))).replace(order=order)
        return lowbit_matmul(x, weight, form=form), x[:, order] @ reference.dequantize(weight)

    operands = drawn(0, 2, 64), drawn(1, 64, 4)
    lowered = {form: jax.jit(run, static_argnums=2).lower(*operands, form) for form in ("kernel", "xla")}
    assert lowered["kernel"].as_text() != lowered["xla"].as_text()
    np.testing.assert_allclose(*lowered["kernel"].compile()(*operands), atol=1e-4)
