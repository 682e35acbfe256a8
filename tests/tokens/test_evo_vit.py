"""Evo-ViT: nothing is lost, the order is told, and official names come and go."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import backbones
from research.backbones import vit
from research.core.cost import params_count
from research.port import names
from research.tokens import evo_vit, moves, policy_macs

COUNTS = pathlib.Path(__file__).parents[1] / "golden" / "token_reduction" / "counts.json"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 32, 32, 3))


@pytest.fixture(scope="module")
def variables(images):
    variables = jax.jit(vit.build(**TINY, global_pool="avg").init)(jax.random.key(0), images[:1])
    return jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, variables)


def apply(variables, images, **options):
    model = vit.build(**TINY, global_pool="avg", reduce=evo_vit.reduction(**options))
    return jax.jit(model.apply)(variables, images)


def test_all_patches_kept_is_the_plain_network(variables, images):
    plain = jax.jit(vit.build(**TINY, global_pool="avg").apply)(variables, images)[0]
    logits, endpoints = apply(variables, images, stages=((1, 3),), keep=1.0)
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5)
    assert not np.array_equal(endpoints["origin"], np.tile(np.arange(17), (2, 1)))


def test_waiting_patches_come_back_as_they_were_and_to_their_places(variables, images):
    _, endpoints = apply(variables, images, stages=((1, 2), (2, 3)), keep=(0.5, 0.25))
    np.testing.assert_array_equal(np.sort(endpoints["origin"], axis=1), np.tile(np.arange(17), (2, 1)))
    before = moves.rows(endpoints["block01"][:, 1:], endpoints["block02_order"])
    np.testing.assert_array_equal(endpoints["block02"][:, 1 + 8 :], before[:, 8:])
    assert float(jnp.min(jnp.abs(endpoints["block02"][:, 1:9] - before[:, :8]).max(-1))) > 0.05
    # What waits through both stages is at the end, in the place that it had in block 1.
    waited = np.sort(np.asarray(moves.rows(endpoints["block02_order"], endpoints["block03_order"])), axis=1)
    np.testing.assert_array_equal(waited, np.tile(np.arange(16), (2, 1)))
    home = moves.unmerge(endpoints["tokens"], endpoints["origin"])
    last = moves.rows(endpoints["block02_order"], endpoints["block03_order"])
    np.testing.assert_array_equal(moves.rows(home[:, 1:], last), endpoints["tokens"][:, 1:])
    assert np.all(np.diff(endpoints["block02_attention"], axis=1) <= 0)


def test_a_stage_without_an_end_leaves_the_waiting_patches_out(variables, images):
    _, endpoints = apply(variables, images, stages=((1, None),), keep=0.5)
    assert endpoints["tokens"].shape[1] == 9
    np.testing.assert_array_equal((endpoints["origin"] >= 0).sum(1), [9, 9])
    kept = np.argsort(endpoints["block02_order"], axis=1) < 8
    np.testing.assert_array_equal(endpoints["origin"][:, 1:] >= 0, kept)


def test_with_a_representative_all_waiting_patches_receive_the_same(variables, images):
    _, endpoints = apply(variables, images, stages=((1, 2),), keep=0.5, representative=True)
    before = moves.rows(endpoints["block01"][:, 1:], endpoints["block02_order"])
    received = endpoints["block02"][:, 1 + 8 :] - before[:, 8:]
    np.testing.assert_allclose(received, jnp.broadcast_to(received[:, :1], received.shape), atol=1e-5)
    assert float(jnp.max(jnp.abs(received))) > 0.05


def test_the_running_mean_is_the_first_attention_where_its_share_is_zero(variables, images):
    first = apply(variables, images, stages=((1, 3),))[1]["block02_attention"]
    kept = apply(variables, images, stages=((2, 3),), tradeoff=0.0)[1]["block03_attention"]
    np.testing.assert_allclose(first, kept, rtol=1e-6)
    np.testing.assert_array_less(first.sum(1), 2.0)  # of two heads, without the class token's attention to itself


def test_bfloat16_goes_through_without_promotion(variables, images):
    reduce = evo_vit.reduction(stages=((1, 3),), representative=True)
    model = evo_vit.build(**TINY, reduce=reduce, dtype=jnp.bfloat16)
    (logits, ends), _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)
    assert logits.dtype == ends["head_cls"].dtype == jnp.bfloat16 and ends["block02_attention"].dtype == jnp.float32


def test_official_names_both_ways(golden):
    with np.load(golden / "token_reduction" / "evo_vit.npz") as data:
        state = {key.removeprefix("w/"): data[key] for key in data.files if key.startswith("w/")}
    deit = evo_vit.to_deit(state)
    assert deit["blocks.3.attn.qkv.weight"].shape == (48, 16)
    np.testing.assert_array_equal(deit["blocks.3.attn.qkv.bias"][32:], state["vs.3.v.bias"])
    again = evo_vit.from_deit(deit)
    assert set(again) == set(state) and all(np.array_equal(again[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="vs.0.v.weight"):
        evo_vit.to_deit({"qks.0.qk.weight": state["qks.0.qk.weight"]})


def test_deit_weights_become_an_evo_vit(variables, images):
    state = names.to_official(variables, evo_vit.NAMES)
    model = vit.build(**TINY, global_pool="avg", reduce=evo_vit.reduction(stages=((1, 3),)))
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    found = names.from_official(shapes, evo_vit.to_deit(evo_vit.from_deit(state)), evo_vit.NAMES)
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, dict(variables)))


def test_counts_are_exact():
    entry = json.loads(COUNTS.read_text())["evo_deit_small"]
    model = evo_vit.build(**backbones.family("deit_small_patch16_224").VARIANTS["deit_small_patch16_224"])
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    (_, endpoints), found = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)
    assert params_count(found["params"]) == entry["params"]
    assert endpoints["tokens"].shape == (1, 197, 384) and endpoints["head_cls"].shape == (1, 1000)
    assert policy_macs.evo_vit(384, 6) == entry["macs"]


def test_impossible_requests_are_explained():
    for options, message in (
        ({"stages": ((0, 4),)}, "block 0 ranks"),
        ({"stages": ((2, 5), (4, 8))}, "ascending"),
        ({"stages": ((2, None), (4, 8))}, "ascending"),
        ({"keep": 0.0}, r"rate in \(0, 1\]"),
        ({"keep": (0.5,)}, "each of 2 stages"),
        ({"tradeoff": 1.5}, r"in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            evo_vit.reduction(**options)
    for arguments, message in (
        ((12, 196, False, False), "class_token=True"),
        ((10, 196, True, False), "10 blocks"),
        ((12, 1, True, False), "leaves none of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            evo_vit.reduction().bind(*arguments)
