"""Swin's windows, shifts, masks and merging, by their meaning. Its numbers are checked by tests/port."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import swin
from research.core import optim
from research.layers import windows
from research.port import names

SMALL = {"img_size": (28, 20), "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4), "window_size": 3}
SMALL |= {"num_classes": 5}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 28, 20, 3))


@pytest.fixture(scope="module")
def variables(images):
    return jax.jit(swin.build(**SMALL).init)(jax.random.key(0), images)


def test_endpoints_are_named_and_shaped(variables, images):
    logits, endpoints = jax.eval_shape(swin.build(**SMALL).apply, variables, images)
    assert logits.shape == (2, 5)
    assert {key: value.shape[1:] for key, value in endpoints.items()} == {
        "patch_embed": (7, 5, 8),
        "stage1": (7, 5, 8),
        "stage2": (4, 3, 16),
        "tokens": (12, 16),
        "pooled": (16,),
    }


def test_windows_are_cut_to_the_map(images):
    model = swin.build(**{**SMALL, "window_size": 4})
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)["params"]
    table = lambda stage: shapes[f"layers_{stage}_blocks_0"]["position"]["relative_position_bias_table"].shape
    assert table(0) == (7 * 7, 2) and table(1) == (7 * 5, 4)


def test_partition_makes_windows_and_merge_undoes_it():
    x = jnp.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    cut = windows.partition(x, (3, 2))
    assert cut.shape == (2, 8, 6, 3)
    np.testing.assert_array_equal(cut[1, 5], x[1, 3:6, 2:4].reshape(6, 3))
    np.testing.assert_array_equal(windows.merge(cut, (3, 2), (6, 8)), x)


@pytest.mark.parametrize("shift", [(2, 1), (2, 0), (0, 1)])
def test_mask_parts_exactly_what_the_roll_brought_together(shift):
    size, window = (8, 6), (4, 3)
    where = np.stack(np.mgrid[: size[0], : size[1]], axis=-1)
    rolled = np.roll(where, (-shift[0], -shift[1]), axis=(0, 1))
    cells = np.asarray(windows.partition(jnp.asarray(rolled)[None], window))[0]
    apart = np.abs(cells[:, :, None] - cells[:, None]) >= np.asarray(window)
    expected = np.where(apart.any(-1), -100.0, 0.0)
    np.testing.assert_array_equal(windows.shift_mask(size, window, shift), expected)


@pytest.mark.parametrize("shifted, reach", [(False, range(3, 6)), (True, range(4, 7))])
def test_a_block_sees_its_window_and_nothing_else(shifted, reach):
    block = swin.Block(num_heads=1, window=(3, 3), shifted=shifted)
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 4))
    variables = jax.jit(block.init, static_argnums=2)(jax.random.key(1), x, False)
    influence = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(block.apply(variables, x, False)[0, 4, 4]))))(x)
    seen = np.argwhere(np.abs(np.asarray(influence[0])).max(-1) > 0)
    assert {tuple(cell) for cell in seen.tolist()} == set(itertools.product(reach, reach))


def test_merging_orders_neighbours_by_column_then_row():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)  # (row, column) -> 2 row + column
    merging = swin.PatchMerging(4)
    variables = jax.jit(merging.init)(jax.random.key(0), x)
    params = {**variables["params"], "reduction": {"kernel": jnp.eye(4)}}
    merged = merging.apply({"params": params}, x).ravel()
    np.testing.assert_array_equal(jnp.argsort(merged), [0, 2, 1, 3])


def test_official_checkpoints_merge_at_the_end_of_a_stage(variables):
    timm, official = (set(names.to_official(variables, rules)) for rules in swin.NAMES.values())
    assert {"layers.1.downsample.reduction.weight", "head.fc.bias", "layers.0.blocks.1.attn.qkv.bias"} <= timm
    assert {"layers.0.downsample.reduction.weight", "head.bias", "layers.0.blocks.1.attn.qkv.bias"} <= official
    state = names.to_official(variables, swin.NAMES["official"])
    state["layers.0.blocks.1.attn_mask"] = state["layers.0.blocks.0.attn.relative_position_index"] = np.zeros(3)
    back = names.from_official(variables, state, swin.NAMES["official"], ignore=swin.IGNORED)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_weight_decay_spares_what_timm_spares(variables):
    decayed = optim.decayed(variables["params"], swin.NO_DECAY)["layers_0_blocks_0"]
    assert not decayed["position"]["relative_position_bias_table"] and decayed["attn"]["qkv"]["kernel"]


def test_training_draws_paths_and_rematerialises(variables, images):
    def gradient(remat):
        model = swin.build(**SMALL, drop_path=0.7, remat=remat)
        total = lambda v, key: jnp.sum(model.apply(v, images, train=True, rngs={"dropout": key})[0] ** 2)
        return jax.jit(jax.grad(total))

    kernel = lambda grads: grads["params"]["layers_0_blocks_0"]["attn"]["qkv"]["kernel"]
    plain, saved = gradient(False), gradient(True)
    draws = [kernel(plain(variables, jax.random.key(seed))) for seed in range(4)]
    np.testing.assert_allclose(kernel(saved(variables, jax.random.key(0))), draws[0], rtol=1e-4, atol=1e-7)
    assert max(float(jnp.max(jnp.abs(other - draws[0]))) for other in draws) > 1e-6


def test_images_of_another_size_are_refused(variables):
    with pytest.raises(ValueError, match="32x20 .* built for 28x20"):
        jax.eval_shape(swin.build(**SMALL).apply, variables, jnp.zeros((1, 32, 20, 3)))
