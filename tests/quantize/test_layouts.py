"""Layouts of other programs: round trips at sizes the golden files do not have, act-order, and what they cannot hold.

That the words are theirs is what the golden files show (`tests/port/test_verify.py`).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from research.quantize.layouts import LAYOUTS, from_codes, from_words, to_words
from research.quantize.quantized import dequantize

RNG = np.random.default_rng(0)


def weight(k, n, bits, group, zeros=None):
    groups = -(-k // group)
    scales = RNG.uniform(0.1, 1, (groups, n)).astype(np.float16).astype(np.float32)
    zeros = RNG.integers(0, 2**bits, (groups, n)) if zeros is None else np.full((groups, n), zeros)
    return from_codes(RNG.integers(0, 2**bits, (k, n)).astype(np.uint8), scales, zeros, bits, group)


@pytest.mark.parametrize(
    ("layout", "k", "n", "bits", "group", "zeros"),
    [
        ("autogptq", 96, 64, 3, 32, None),
        ("autogptq", 64, 32, 2, 64, None),
        ("autogptq", 96, 32, 8, 40, None),  # the last group is not full
        ("autogptq_v2", 64, 32, 4, 16, None),
        ("autoawq", 48, 24, 4, 16, None),
        ("tinychat", 128, 12, 4, 32, None),
        ("tinychat", 192, 8, 4, 192, None),
        ("marlin", 256, 256, 4, 128, 8),
        ("marlin", 256, 512, 4, 256, 8),
    ],
)
def test_what_is_written_reads_back(layout, k, n, bits, group, zeros):
    q = weight(k, n, bits, group, zeros)
    arrays = LAYOUTS[layout].write(q)
    assert set(LAYOUTS[layout].parts) <= set(arrays)
    codes = arrays["B" if layout == "marlin" else "qweight"]
    assert codes.nbytes * 8 == k * n * bits
    back = LAYOUTS[layout].read(arrays, bits, group)
    np.testing.assert_array_equal(dequantize(back), dequantize(q))


def test_three_bits_straddle_words():
    codes = np.zeros((32, 1), np.uint8)
    codes[10], codes[21] = 5, 6  # bits 30 to 32 and 63 to 65 of the stream
    words = to_words(codes, 3).view(np.uint32)[:, 0]
    np.testing.assert_array_equal(words, [1 << 30, 1 | 0 << 31, 3])
    np.testing.assert_array_equal(from_words(words[:, None].view(np.int32), 3), codes)


def test_groups_of_any_inputs_keep_their_inputs():
    q = weight(64, 32, 4, 16)
    order = RNG.permutation(64)
    moved = dataclasses.replace(q, order=jnp.asarray(order, jnp.int32))
    expected = np.empty((64, 32), np.float32)
    expected[order] = dequantize(q)
    np.testing.assert_array_equal(dequantize(moved), expected)
    arrays = LAYOUTS["autogptq"].write(moved)
    np.testing.assert_array_equal(arrays["g_idx"][order], np.arange(64) // 16)
    np.testing.assert_array_equal(dequantize(LAYOUTS["autogptq"].read(arrays, 4)), expected)
    with pytest.raises(ValueError, match="autoawq has no groups of inputs that are no neighbours"):
        LAYOUTS["autoawq"].write(moved)


@pytest.mark.parametrize(
    ("layout", "arguments", "message"),
    [
        ("autoawq", (64, 32, 2, 16), "autoawq holds 4 bits, not 2"),
        ("autogptq", (60, 32, 4, 20), "multiples of 32 inputs and 32 outputs, not 60 and 32"),
        ("marlin", (256, 256, 4, 64, 8), "groups of 128 or all inputs and zero points 8, not groups of 64"),
        ("marlin", (256, 64, 4, 128, 8), "multiples of 128 inputs and 256 outputs, not 256 and 64"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(layout, arguments, message):
    with pytest.raises(ValueError, match=message):
        LAYOUTS[layout].write(weight(*arguments))
