"""Relative positions against the official index buffer, and by their meaning."""

import jax
import jax.numpy as jnp
import numpy as np

from research.layers.position import RelativePositionBias, relative_position_index


def test_index_is_the_official_buffer(golden):
    with np.load(golden / "vanillakd" / "beit.npz") as data:
        official = data["w/blocks.0.attn.relative_position_index"]
    side = round((len(official) - 1) ** 0.5)
    np.testing.assert_array_equal(relative_position_index(side, side, class_token=True), official)


def test_equal_offsets_share_a_row_and_others_do_not():
    index = relative_position_index(3, 4)
    cells = [(y, x) for y in range(3) for x in range(4)]
    rows = {}
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            rows.setdefault((y - v, x - u), set()).add(int(index[i, j]))
    assert all(len(found) == 1 for found in rows.values())
    assert sorted(row for found in rows.values() for row in found) == list(range(5 * 7))


def test_bias_reads_the_table_for_every_pair_and_head():
    module = RelativePositionBias((2, 3), 4, class_token=True, init=jax.nn.initializers.normal())
    bias, variables = module.init_with_output(jax.random.key(0))
    table = variables["params"]["relative_position_bias_table"]
    assert table.shape == (3 * 5 + 3, 4) and bias.shape == (4, 7, 7)
    # Class to token, token to class, class to class are the last three rows, in this order.
    np.testing.assert_array_equal(bias[:, 0, 3], table[-3])
    np.testing.assert_array_equal(bias[:, 5, 0], table[-2])
    np.testing.assert_array_equal(bias[:, 0, 0], table[-1])
    # Token 1 (row 0, column 0) from token 6 (row 1, column 2): offset (-1, -2), the first row.
    np.testing.assert_array_equal(bias[:, 1, 6], table[0])
    gradient = jax.grad(lambda v: jnp.sum(module.apply(v)))(variables)["params"]["relative_position_bias_table"]
    np.testing.assert_array_equal(gradient[0], np.ones(4))
