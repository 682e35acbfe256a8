"""What no method can do, said in one line that names the option and the number; and one result on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tokens
from research.backbones import vit
from research.core import sharding
from research.layers import reduction
from research.tokens import ats, dynamicvit, evit, evo_vit, ppt, tome

THRESHOLD = 8e-4  # between the variances of the images of the last test
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
METHODS = {
    "ppt": ppt.reduction(5, (0,), threshold=0.0),
    "tome": tome.reduction([5, 0]),
    "evit": evit.reduction(0.5, (0,)),
    "ats": ats.reduction((0,)),
    "dynamicvit": dynamicvit.reduction((1,), 0.5),
    "evo_vit": evo_vit.reduction(((1, 2),), 0.5),
}


@pytest.fixture(scope="module")
def variables():
    """Of the network with DynamicViT's predictors, which the others leave aside."""
    model = vit.build(**SMALL, reduce=METHODS["dynamicvit"])
    found = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, found)


@pytest.mark.parametrize("method", METHODS)
def test_scores_that_are_not_finite_are_an_error(method, variables):
    """One pixel of one image is no number; nothing is ranked, also not the other image."""
    images = jnp.ones((2, 32, 32, 3)).at[1, 3, 3, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="are not all finite: the tokens of this batch hold NaN"):
        vit.build(**SMALL, reduce=METHODS[method]).apply(variables, images)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: evit.reduction(0), r"^keep_rate: 0 is not in \(0, 1\]"),
        (lambda: evit.reduction((0.5, 0.0), (0, 1)), r"^keep_rate: 0.0 is not in \(0, 1\]"),
        (lambda: evit.reduction(float("nan")), r"^keep_rate: nan is not in \(0, 1\]"),
        (lambda: dynamicvit.reduction((1,), 0.0), r"^keep=0.0: rates lie in \(0, 1\]"),
        (lambda: dynamicvit.reduction((1, 2), (0.5, 0.0)), r"rates lie in \(0, 1\]"),
        (lambda: evo_vit.reduction(keep=0), r"^keep=0: give a rate in \(0, 1\]"),
        (lambda: ats.reduction((1,), most=0), "^most=0: at least one patch has to be kept"),
        (lambda: reduction.build(tokens.parse("evit:keep_rate=0")), r"keep_rate: 0 is not in \(0, 1\]"),
        (lambda: reduction.build(tokens.parse("dynamicvit:at=1+,keep=0")), r"rates lie in \(0, 1\]"),
    ],
)
def test_a_keep_rate_of_zero_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def bound(reduce, patches=16, depth=4, distilled=False):
    return reduce.bind(depth, patches, True, distilled)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: bound(tome.reduction(17)), "^r=17 removes more tokens than the 16 patches that are left: lower r"),
        (lambda: bound(tome.reduction(5)), "^r=5 removes more tokens than the 3 patches"),  # 17, 12, 7, 4
        (lambda: bound(tome.reduction([0, 17]), distilled=True), "^r=17 removes more tokens than the 16 patches"),
        (lambda: bound(tome.reduction(9, inflect=-1.0)), "^r=18 removes more tokens than the 16"),
        (lambda: bound(ppt.reduction(17, (2,))), "^r=17 removes more tokens than the 16 patches"),
        (lambda: bound(ppt.reduction((8, 9), (0, 1))), "^r=9 removes more tokens than the 8 patches"),
        (lambda: bound(ppt.reduction(18, (0,), policy="prune"), distilled=True), "^r=18 .* the 17 patches"),
        (lambda: bound(ppt.reduction(17, (0,), policy="pool"), distilled=True), "^r=17 .* the 16 patches"),
        (lambda: bound(ppt.reduction(17, (0,), policy="prune", protect_distilled=True), distilled=True), "the 16 pat"),
        (lambda: bound(dynamicvit.reduction((1, 2), 0.2)), r"leaves none of 16 patches"),  # 0.04 in the end
        (lambda: bound(evo_vit.reduction(((1, 2),), 0.06)), "^keep=.*leaves none of 16 patches"),
        (lambda: bound(ats.reduction((1,)), patches=1), "among two patches or more, not 1"),
    ],
)
def test_more_tokens_than_there_are_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_limits_themselves_are_none():
    """All patches asked for is cut to half of them, officially; a rate keeps a patch at least."""
    assert bound(tome.reduction([16])).left(0, 17) == 9
    assert bound(ppt.reduction(16, (0,))).r == (8,)
    assert bound(evit.reduction(1e-9, (0,))).left(0, 17) == 3
    assert bound(ats.reduction((1,), most=99)).left(1, 17) == 17


@pytest.mark.parametrize("method", METHODS)
def test_misuse_of_the_distillation_token_is_an_error(method):
    """There is none without a class token, none that is pooled; only ToMe and DynamicViT need no class token."""
    build = lambda **options: vit.build(**SMALL, reduce=METHODS[method], **options)
    with pytest.raises(ValueError, match="distilled=True reads its two tokens: use global_pool='token'"):
        build(distilled=True, global_pool="avg")
    with pytest.raises(ValueError, match="global_pool='token' needs class_token=True"):
        build(distilled=True, class_token=False)
    if method not in ("tome", "dynamicvit"):
        with pytest.raises(ValueError, match="class_token=True"):
            METHODS[method].bind(4, 16, False, False)


MESHES = {"fsdp": {"fsdp": 8}, "tensor": {"data": 2, "fsdp": 2, "tensor": 2}}
RULES = {
    "fsdp": [(".*", "fsdp")],
    "tensor": [(r"(qkv|fc1)/kernel", "fsdp+tensor:-1"), (r"(proj|fc2)/kernel", "fsdp+tensor:0"), (".*", "fsdp")],
}


@pytest.mark.parametrize("method, meshes", [("ppt", ["tensor"]), ("tome", ["fsdp", "tensor"]), ("evit", ["tensor"])])
def test_fsdp_and_tensor_meshes_agree_with_one_device(method, meshes, variables):
    """Logits, what goes where, and gradients, with parameters split and ops mapped over the mesh."""
    reduce = ppt.reduction(5, (0,), threshold=THRESHOLD) if method == "ppt" else METHODS[method]
    model = vit.build(**SMALL, reduce=reduce)
    images = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))

    def loss(params, images):
        logits, endpoints = model.apply({"params": params}, images)
        return jnp.sum(jnp.square(logits)), (logits, endpoints["origin"], endpoints.get("block01_pruned"))

    params = {name: value for name, value in variables["params"].items() if not name.startswith("score_predictor")}
    expected, seen = jax.jit(jax.grad(loss, has_aux=True))(params, images)
    if method == "ppt":
        assert 0 < int(jnp.sum(seen[2])) < 8
    for name in meshes:
        mesh = sharding.mesh(MESHES[name])
        placed = jax.device_put(params, sharding.shardings(params, mesh, RULES[name], smallest=64))
        assert not placed["blocks_0"]["attn"]["qkv"]["kernel"].sharding.is_fully_replicated
        with jax.set_mesh(mesh):
            split = jax.device_put(images, sharding.batch_sharding(mesh))
            found, others = jax.jit(jax.grad(loss, has_aux=True))(placed, split)
        np.testing.assert_array_equal(others[1], seen[1])
        np.testing.assert_allclose(others[0], seen[0], rtol=1e-4, atol=1e-4)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(other))))
