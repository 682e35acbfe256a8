"""Reductions as configs and command lines write them, and thresholds of PPT for images of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from research import backbones, tokens
from research.backbones import classify
from research.layers import reduction
from research.tokens import calibrate, evit, ppt, tome

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    "text, value",
    [
        ("ppt:r=50,blocks=3+6+9,threshold=7e-5", ppt.reduction(50, (3, 6, 9), 7e-5)),
        (
            "research.tokens.ppt:r=5,blocks=3+,policy=prune,prop_attn=false",
            ppt.reduction(5, (3,), 7e-5, "prune", 0, False),
        ),
        ("ppt:r=3+2,blocks=0+1,policy=prune+pool", ppt.reduction((3, 2), (0, 1), policy=("prune", "pool"))),
        ("tome:r=13,inflect=-1.0", tome.reduction(13, -1.0)),
        ("evit", evit.reduction()),
    ],
)
def test_a_text_stands_for_a_reduction(text, value):
    spec = tokens.parse(text)
    assert reduction.build(spec) == value == reduction.build(ConfigDict(spec))
    model = backbones.create("deit_tiny_patch16_224", reduce=spec)
    assert model == backbones.create("deit_tiny_patch16_224", reduce=value)
    assert backbones.create("lvvit_t", reduce=spec).reduce == value
    assert reduction.build(value) is value and reduction.build(None) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("pppt:r=3", "reduce.method: 'research.tokens.pppt' is not the import path"),
        ("research.tokens.moves:r=3", "reduce.method: 'research.tokens.moves' is not"),
        ("tome:rr=3", "reduce: research.tokens.tome does not take {'rr': 3}"),
        ("ppt:r=3,blocks=3", "reduce: research.tokens.ppt does not take"),
        ("evit:keep_rate=0", "keep_rate: 0 is not in"),
        ("tome:r", "write its options as r=<value>"),
    ],
)
def test_what_stands_for_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        backbones.create("deit_tiny_patch16_224", reduce=tokens.parse(text))
    with pytest.raises(ValueError, match="reduce.method: ''"):
        reduction.build({"r": 3})


@pytest.mark.parametrize("share, pruned", [(0, 0), (0.3, 3), (0.5, 5), (0.96, 10), (1, 10)])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_a_threshold_prunes_the_share(share, pruned, scale):
    variances = scale * np.random.default_rng(0).permutation(np.arange(1, 11, dtype=np.float32))
    found = np.float32(calibrate.threshold(variances, share))
    assert np.sum(variances >= found) == pruned
    # Neighbours of float32 are parted too, and equal ones stay together.
    near = np.asarray([1, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    assert np.sum(near >= np.float32(calibrate.threshold(near, 0.5))) == 1
    assert np.sum(variances[:1] * np.ones(4, np.float32) >= calibrate.threshold(variances[:1].repeat(4), 0.5)) == 0


def test_wrong_shares_and_variances_are_refused():
    for variances, share, message in (
        (np.ones(3), 1.5, "share: 1.5 is not in"),
        (np.asarray([1.0, np.nan]), 0.5, "variances: 2, of which 1 are finite"),
        (np.ones(0), 0.5, "variances: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate.threshold(variances, share)
    with pytest.raises(ValueError, match="share has 3 entries for 2 blocks"):
        calibrate.calibrated(ppt.reduction(2, (0, 1)), lambda *_: np.ones(2), (0.5, 0.5, 0.5))


def test_every_block_prunes_its_share_of_the_images():
    network = classify.network("vit_tiny_patch16_224", 5, 16, **SMALL)
    params, state = jax.jit(network.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: 8 * x, params)
    images = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    variances = calibrate.measured(network, params, state, lambda: [images[:4], images[4:]])
    found = calibrate.calibrated(ppt.reduction(4, (0, 1)), variances, (0.5, 0.25))
    assert all(found.threshold) and found.r == 4
    reduced = network._replace(module=network.module.clone(reduce=found))
    seen = jax.jit(lambda x: reduced.apply(params, state, x)[1])(images)
    assert [int(jnp.sum(seen[f"block{block:02d}_pruned"])) for block in (1, 2)] == [4, 2]
