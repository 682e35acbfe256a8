"""Arrays of few bits: what comes back, in how many bytes, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.lowbit_matmul import layout
from research.quantize.grids import Form, Grid, fit
from research.quantize.quantized import check, dequantize, pack, quantize, unpack


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bits", sorted(layout.PLANES))
@pytest.mark.parametrize("k", [1, 97, 512])
def test_planes_give_back_every_code(bits, k):
    codes = np.random.default_rng(k).integers(0, 2**bits, (k, 3))
    planes, back = jax.jit(lambda c: (p := layout.pack_codes(c, bits), layout.unpack_codes(p, bits, k)))(codes)
    assert sum(plane.nbytes for plane in planes) * 8 == layout.padded_rows(k) * 3 * bits
    np.testing.assert_array_equal(back, codes)


def test_a_shift_of_a_plane_is_a_run_of_rows():
    """What kernels rely on: with 512 rows in blocks of 256, shift 4 j of a block's words is rows 32 j to 32 (j + 1)."""
    codes = np.random.default_rng(0).integers(0, 16, (512, 3))
    (words,) = layout.pack_codes(jnp.asarray(codes), 4)
    for block in range(2):
        for j in range(8):
            run = (np.asarray(words)[32 * block : 32 * (block + 1)] >> (4 * j)) & 15
            np.testing.assert_array_equal(run, codes[256 * block + 32 * j :][:32])


FORMS = [
    Form(8, rule="absmax"),
    Form(4, group=32),
    Form(4, per_tensor=True, rule="gptq_symmetric"),
    Form(3, group=16, rule="awq"),
    Form(2, rule="omniquant"),
    Form(2, group=8, rule="gptq_mse"),
    Form(1, rule="sign"),
    Form(4, group=48, rule="absmax", pad=True),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_number_is_within_half_a_step_and_packing_keeps_it(form):
    x = drawn(0, 64, 5)

    @jax.jit
    def through(x):
        q = quantize(x, form)
        packed = pack(q)
        return q, packed, dequantize(q), dequantize(unpack(packed))

    q, packed, back, again = through(x)
    assert back.shape == packed.shape == x.shape
    if form.rule not in ("sign", "gptq_mse"):  # those clip
        scales = np.asarray(q.scales) if form.per_tensor else np.repeat(q.scales, q.group, axis=0)[:64]
        steps = 1 if form.rule == "gptq_symmetric" else 0.5  # the largest number has no code of its own there
        assert np.all(np.abs(back - x) <= scales * steps * (1 + 1e-5))
    assert packed.nbytes == 64 * 5 * form.bits / 8 + q.scales.nbytes + (0 if q.zeros is None else q.zeros.nbytes)
    np.testing.assert_array_equal(again, back)
    if form.rule == "sign":
        np.testing.assert_allclose(back, np.sign(x) * np.abs(x).mean(0), rtol=1e-6)


def test_tokens_have_scales_of_their_own():
    x = drawn(2, 2, 3, 8)
    tokens = quantize(jnp.asarray(x), Form(8, axis=-1, rule="absmax"))
    assert tokens.scales.shape == (2, 3, 1) and tokens.axis == 2 and tokens.codes.dtype == jnp.int8
    np.testing.assert_allclose(tokens.scales[..., 0], np.abs(x).max(-1) / 127, rtol=1e-6)
    assert np.abs(np.asarray(tokens.codes)).max() == 127


def test_scales_of_sixteen_bits_decide_the_codes():
    x, form = jnp.asarray(drawn(3, 64, 4)), Form(4, group=32)
    grid = jax.tree.map(lambda a: a.astype(jnp.bfloat16), fit(x, form))
    q = quantize(x, form, grid)
    assert q.scales.dtype == jnp.bfloat16
    inside = (np.asarray(q.codes) > 0) & (np.asarray(q.codes) < 15)
    error = np.abs(np.asarray(dequantize(q)) - x)
    assert np.all(error[inside] <= 0.5001 * np.repeat(np.asarray(q.scales, np.float32), 32, 0)[inside])


def test_a_quantised_array_goes_through_vmap():
    x, form = jnp.asarray(drawn(4, 3, 32, 4)), Form(4, group=16)
    q = jax.jit(jax.vmap(lambda w: quantize(w, form)))(x)
    assert q.codes.shape == (3, 32, 4)
    np.testing.assert_allclose(jax.vmap(dequantize)(q)[1], dequantize(quantize(x[1], form)), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "bits: 9 is not from 1 to 8"),
        ({"bits": 4, "rule": "round"}, "rule: 'round' is none of"),
        ({"bits": 1, "rule": "absmax"}, "rule: 'absmax' has no 1 bits"),
        ({"bits": 4, "rule": "sign"}, "rule: 'sign' has no 4 bits"),
        ({"bits": 4, "group": 0}, "group: 0 is no number"),
    ],
)
def test_what_is_no_form_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Form(**arguments)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group: 48 does not divide the 64 entries of axis 0; pad=True"):
        jax.eval_shape(lambda x: quantize(x, Form(4, group=48)), jnp.zeros((64, 2)))


def test_broken_promises_are_named():
    q = jax.eval_shape(lambda x: quantize(x, Form(4, group=32)), jnp.zeros((64, 4)))
    with pytest.raises(ValueError, match="groups fill the axis"):
        check(dataclasses.replace(q, group=16))
    with pytest.raises(ValueError, match="codes are int8, or uint8 with zero points"):
        check(dataclasses.replace(q, zeros=None))
    with pytest.raises(ValueError, match="only a matrix"):
        jax.eval_shape(lambda x: pack(quantize(x, Form(4, axis=1))), jnp.zeros((4, 8)))


def test_a_grid_of_ones_own_is_taken():
    x = jnp.asarray([[0.4], [0.6], [-9.0]])
    q = quantize(x, Form(2), Grid(jnp.ones((1, 1)), jnp.ones((1, 1))))
    np.testing.assert_array_equal(q.codes[:, 0], [1, 2, 0])
