"""PPT, ToMe and EViT in the ViT: what the golden files do not show."""

import contextlib
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import vit
from research.core import sharding
from research.tokens import evit, moves, ppt, tome

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
TOKENS = 17
METHODS = {
    "ppt": ppt.reduction((5, 3), (0, 1), threshold=0.0),
    "tome": tome.reduction(5),
    "evit": evit.reduction(0.6, (0, 1)),
}
LEFT = {"ppt": 9, "tome": 7, "evit": 9}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, 32, 32, 3))


@pytest.fixture(scope="module")
def variables(images):
    """Variables of the network without reduction, large enough that images differ."""
    variables = jax.jit(vit.build(**SMALL).init)(jax.random.key(0), images[:1])
    return jax.tree.map(lambda x: 8 * x, variables)


@pytest.fixture(scope="module")
def middle(variables, images):
    """PPT with a threshold between the variances of these images in the first block."""
    model = vit.build(**SMALL, reduce=METHODS["ppt"])
    variances = jax.jit(lambda v, x: model.apply(v, x)[1]["block01_variance"])(variables, images)
    return dataclasses.replace(METHODS["ppt"], threshold=float(jnp.median(variances)))


@pytest.mark.parametrize("method, context", [("ppt", False), *((method, True) for method in METHODS)])
def test_eight_devices_agree_with_one_and_tokens_are_accounted_for(method, context, variables, images, middle):
    """Partitioned by XLA, and in the context of the mesh, over which the ops then map themselves."""
    reduce = middle if method == "ppt" else METHODS[method]
    apply = jax.jit(vit.build(**SMALL, reduce=reduce).apply)
    logits, endpoints = apply(variables, images)
    mesh = sharding.mesh({"data": 4, "fsdp": 2})
    data = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        sharded, taps = apply(variables, jax.device_put(images, data))
    assert sharded.sharding.is_equivalent_to(data, 2)
    np.testing.assert_allclose(sharded, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(taps["origin"], endpoints["origin"])

    sizes = moves.sizes(endpoints["origin"], LEFT[method])
    assert endpoints["block02"].shape == (8, LEFT[method], 12)
    if method == "ppt":
        pruned = endpoints["block01_pruned"]
        assert 0 < int(jnp.sum(pruned)) < 8
        np.testing.assert_array_equal(endpoints["size"], sizes)
        lost = TOKENS - jnp.sum(sizes, axis=1)
        assert (lost > 0).tolist() == (pruned | endpoints["block02_pruned"]).tolist()
    else:
        assert jnp.sum(sizes, axis=1).tolist() == [TOKENS] * 8
    if method == "tome":
        np.testing.assert_array_equal(endpoints["size"], sizes)
    assert bool(jnp.all(endpoints["origin"][:, 0] == 0))


KERNELS = {
    "ppt": {"ppt_reduce", "token_attention"},
    "tome": {"token_matching", "token_attention"},
    "evit": {"token_select", "token_attention"},
}


@pytest.mark.parametrize("method", METHODS)
def test_kernels_run_on_tpus_in_the_context_of_a_mesh(method, variables, images):
    traced = lambda: jax.jit(vit.build(**SMALL, reduce=METHODS[method]).apply).trace(variables, images)
    kernels = lambda text: set(re.findall(r'kernel_name = "(\w+)"', text))
    text = lambda: traced().lower(lowering_platforms=("tpu",)).as_text()
    assert not kernels(text())
    with jax.set_mesh(sharding.mesh({"data": 4, "fsdp": 2})):
        assert kernels(text()) == KERNELS[method]
    with jax.set_mesh(sharding.mesh({"data": 4, "tensor": 2})):  # three heads do not divide
        assert kernels(text()) == KERNELS[method] - {"token_attention"}


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_trains(method, variables, images, middle):
    one_block = {"tome": METHODS["tome"], "evit": evit.reduction(0.6, (0,))}
    one_block["ppt"] = ppt.reduction(5, (0,), threshold=middle.threshold)
    options = {**SMALL, "depth": 1, "dtype": jnp.bfloat16, "remat": True}
    model = vit.build(**options, reduce=one_block[method])

    def loss(variables):
        logits, endpoints = model.apply(variables, images, train=True)
        assert logits.dtype == endpoints["block01"].dtype == jnp.bfloat16
        return jnp.sum(logits.astype(jnp.float32) ** 2)

    gradients = jax.jit(jax.grad(loss))(variables)
    for leaf in jax.tree.leaves(gradients):
        assert leaf.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(leaf)))
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(gradients["params"]["blocks_0"]["attn"]))


def shapes(**changes):
    """Shapes of (logits, endpoints) and variables."""
    model = vit.build(**{**SMALL, **changes})
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)


def test_reductions_add_no_parameters_and_are_values(variables):
    for reduce in METHODS.values():
        found = shapes(reduce=reduce)[1]
        assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, variables)
        assert vit.build(**SMALL, reduce=reduce) == vit.build(**SMALL, reduce=dataclasses.replace(reduce))
        assert hash(vit.build(**SMALL, reduce=reduce)) is not None


@pytest.mark.parametrize(
    "reduce, tokens",
    [
        (tome.reduction(6), [12, 7]),  # the last step stops at half of what is not protected
        (ppt.reduction(7, (0, 1)), [11, 7]),
        (ppt.reduction((7, 3), (0, 1), policy=("prune", "pool"), protect_distilled=True), [11, 8]),
        (evit.reduction((0.5, 0.25), (0, 1), fuse=False), [10, 4]),
        (evit.reduction((0.5, 0.25), (0, 1), fuse=True, protect_distilled=True), [11, 6]),
    ],
)
def test_tokens_with_a_distillation_token(reduce, tokens):
    (logits, endpoints), _ = shapes(distilled=True, reduce=reduce)
    assert [endpoints[f"block0{i}"].shape[1] for i in (1, 2)] == tokens and logits.shape == (2, 5)


def test_the_distillation_token_goes_unless_it_is_protected():
    seen = ppt.Seen(jnp.asarray([[2.0, 0.0, 0.4, 0.3, 0.3]]), jnp.ones((1, 5, 2)))
    step = ppt.step(jnp.ones((1, 5, 3)), jnp.ones((1, 5)), seen, 1, 0.0, "prune")
    assert step.moves.keep.tolist() == [[0, 2, 3, 4]]
    model = vit.build(**SMALL, distilled=True, reduce=ppt.reduction(8, (0,), policy="prune", protect_distilled=True))
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    _, endpoints = jax.jit(model.apply)(jax.jit(model.init)(jax.random.key(0), x), x)
    assert endpoints["origin"][:, :2].tolist() == [[0, 1]] * 2
    np.testing.assert_array_equal(endpoints["block01_scores"][:, :2], 2.0)


def test_pooling_over_merged_tokens_counts_their_parts(variables, images):
    """With keys that are all alike nothing else tells: the mean over patches is the same after any merging."""
    params = {k: v for k, v in variables["params"].items() if k not in ("norm", "cls_token")}
    params |= {"fc_norm": variables["params"]["norm"], "pos_embed": variables["params"]["pos_embed"][:, 1:]}
    for block in ("blocks_0", "blocks_1"):  # blocks that pass their tokens on
        params[block] = jax.tree.map(jnp.zeros_like, params[block])
    options = {"class_token": False, "global_pool": "avg"}
    pooled = [
        jax.jit(vit.build(**SMALL, **options, reduce=reduce).apply)({"params": params}, images)[0]
        for reduce in (None, tome.reduction(5))
    ]
    np.testing.assert_allclose(pooled[1], pooled[0], atol=1e-4)


def test_schedules_are_the_official_ones(golden):
    with np.load(golden / "token_reduction" / "tome_vit.npz") as data:
        examples = json.loads(str(data["meta"]))["parse_r_examples"]
    for key, expected in examples.items():
        depth, r = json.loads(key)
        slope = isinstance(r, list) and len(r) == 2
        assert list(tome.schedule(depth, r[0], r[1]) if slope else tome.schedule(depth, r)) == expected
    assert tome.schedule(1, 7) == (7,)

    with np.load(golden / "token_reduction" / "evit__fuse.npz") as data:
        rows = json.loads(str(data["meta"]))["adjust_keep_rate"]["rows_iter_epoch_rate"]
    for step, _, rate in rows:
        assert evit.warmup(step, 7, 0.7, start=10, epochs=100) == pytest.approx(rate, abs=1e-12)


def test_keep_rates_fall_in_few_stages():
    stages = evit.stages(10, base=0.5, start=2, epochs=8, levels=5)
    steps, rates = zip(*stages, strict=True)
    np.testing.assert_allclose(rates, [1, 0.9, 0.8, 0.7, 0.6, 0.5])
    assert steps[0] == 0 and list(steps) == sorted(steps) and 20 < steps[1] and steps[-1] < 100
    for step in range(0, 130):
        rate = [r for first, r in stages if first <= step][-1]
        assert abs(rate - evit.warmup(step, 10, 0.5, 2, 8)) <= 0.05 + 1e-9


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ppt.reduction(5, (3, 3)), "do not ascend"),
        (lambda: ppt.reduction(5, policy="merge"), "'merge' is none of adaptive"),
        (lambda: ppt.reduction((5, 5)), "r has 2 entries for 3 blocks"),
        (lambda: ppt.reduction(-1), "negative number of tokens"),
        (lambda: tome.reduction(5, inflect=2), "not between -1 and 1"),
        (lambda: tome.reduction([5, 5], inflect=1), "one number a block says it all"),
        (lambda: evit.reduction(0), "0 is not in"),
        (lambda: evit.reduction([0.5, 1.5], (0, 1)), "1.5 is not in"),
        (lambda: evit.reduction([0.5], (0, 1)), "1 entries for 2 blocks"),
        (lambda: shapes(reduce=ppt.reduction(5)), r"\[3, 6, 9\] are not among the 2 blocks"),
        (lambda: shapes(reduce=evit.reduction(0.5, (2,))), r"\[2\] are not among the 2 blocks"),
        (lambda: shapes(reduce=tome.reduction([1, 1, 1])), "3 numbers for 2 blocks"),
        (lambda: shapes(reduce=tome.reduction(17)), "r=17 removes more tokens than the 16 patches"),
        (lambda: shapes(reduce=ppt.reduction(9, (0, 1))), "more tokens than the 8 patches that are left"),
        (lambda: shapes(reduce=ppt.reduction(2, (0,)), class_token=False, global_pool="avg"), "needs class_token"),
        (lambda: shapes(reduce=evit.reduction(0.5, (0,)), class_token=False, global_pool="avg"), "needs class_token"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
