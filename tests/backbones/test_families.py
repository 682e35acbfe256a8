"""What every family of networks must do: train in bfloat16 over eight devices, compile once, keep official names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import backbones
from research.core import sharding
from research.port import checkpoint, names
from tests.backbones import drawn

# Variant, and what makes it small enough to compile in a moment.
TINY = {
    "mobilenet_v3": (
        "mobilenetv3_large_100",
        {"stages": (("ir_s2_e2_c8_se0.25",), ("cn_k1_c16",)), "stem": 8, "head": 8},
    ),
    "efficientnet": ("tf_efficientnet_b0", {"stages": (("ds_c8",), ("ir_k5_s2_e2_c8_se0.25",)), "stem": 8, "head": 8}),
    "ghostnet": ("ghostnetv2_100", {"cfgs": (((3, 4, 16, 0, 1), (3, 4, 16, 0, 1), (3, 8, 16, 0.25, 1)),), "head": 8}),
    "resnet_v2": (
        "resnetv2_50x1_bit",
        {"layers": (1, 1), "channels": (16, 16), "stem_chs": 8, "groupnorm_groups": 2},
    ),
    "vit": (
        "vit_base_patch32_clip_quickgelu_224",
        {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    ),
    "clip": (
        "clip_vit_b32_full",
        {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "hidden": 32, "vocabulary": 16}
        | {"context": 5, "text_width": 8, "text_depth": 1, "text_heads": 1, "text_hidden": 16},
    ),
    "swin_v2": (
        "swinv2_tiny_window8_256",
        {"img_size": (28, 20), "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4), "window_size": 3},
    ),
}
SIZE = 20


@functools.cache
def tiny(family: str, **changes):
    name, options = TINY[family]
    return backbones.create(name, **{**options, "num_classes": 10, **changes})


@functools.cache
def images_and_variables(family: str):
    images = jax.random.normal(jax.random.key(1), (8, *_size(family), 3))
    return images, drawn.variables(tiny(family), images)


def _size(family: str) -> tuple[int, int]:
    size = getattr(tiny(family), "img_size", SIZE)
    return (size, size) if isinstance(size, int) else size


def trainer(model):
    """A jitted function: (variables, images, labels, key) -> (loss, gradients of the parameters, new state)."""

    def loss(params, state, images, labels, key):
        variables, rngs = {"params": params, **state}, {"dropout": key}
        (logits, _), new = model.apply(variables, images, train=True, rngs=rngs, mutable=list(state))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[:, None], axis=1)
        return -jnp.mean(picked), new

    @jax.jit
    def step(variables, images, labels, key):
        state = {name: tree for name, tree in variables.items() if name != "params"}
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"], state, images, labels, key)
        return value, grads, new

    return step


@pytest.mark.parametrize("family", TINY)
def test_bfloat16_over_eight_devices_trains_as_float32_on_one(family):
    images, variables = images_and_variables(family)
    labels, key = jnp.arange(8), jax.random.key(2)
    mesh = sharding.mesh({"fsdp": 8})
    placed = jax.device_put(variables, sharding.shardings(variables, mesh, [(".*", "fsdp")], smallest=8))
    batch = jax.device_put((images, labels), sharding.batch_sharding(mesh))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed["params"]))

    exact, gradients, new = trainer(tiny(family))(variables, images, labels, key)
    step = trainer(tiny(family, dtype=jnp.bfloat16))
    found, grads, found_new = step(placed, *batch, key)
    step(placed, batch[0] + 1, batch[1], jax.random.key(3))
    assert step._cache_size() == 1
    np.testing.assert_allclose(found, exact, rtol=0.05)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=0.1), found_new, new)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
    ours, theirs = flat(grads), flat(gradients)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert ours @ theirs > 0.95 * np.linalg.norm(ours) * np.linalg.norm(theirs) > 0


@pytest.mark.parametrize("family", TINY)
def test_evaluation_is_compiled_once_and_bfloat16_stays_bfloat16(family):
    images, variables = images_and_variables(family)
    apply = jax.jit(tiny(family, dtype=jnp.bfloat16).apply)
    logits, endpoints = apply(variables, images)
    apply(variables, images + 1)
    assert apply._cache_size() == 1 and np.all(np.isfinite(logits.astype(jnp.float32)))
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, endpoints))} == {jnp.dtype("bfloat16")}
    assert logits.shape == (8, 10) and endpoints["pooled"].ndim == 2


@pytest.mark.parametrize("family", TINY)
def test_another_resolution_is_taken_or_refused_by_name(family):
    images, variables = images_and_variables(family)
    other = jnp.zeros((1, images.shape[1] + 12, images.shape[2] + 4, 3))
    if not hasattr(tiny(family), "img_size"):
        assert jax.eval_shape(tiny(family).apply, variables, other)[0].shape == (1, 10)
        return
    with pytest.raises(ValueError, match="build it with img_size"):
        jax.eval_shape(tiny(family).apply, variables, other)


@pytest.mark.parametrize("family", TINY)
def test_official_names_there_and_back(family):
    _, variables = images_and_variables(family)
    for rules in backbones.family(TINY[family][0]).NAMES.values():
        state = names.to_official(variables, rules)
        back = names.from_official(variables, state, rules)
        jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050"])
def test_files_under_official_names_come_back(name, tmp_path):
    variables = drawn.variables(backbones.create(name), jnp.zeros((1, 64, 64, 3)))
    checkpoint.save_official(variables, name, tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_official(name, tmp_path / "w.safetensors"), variables)
