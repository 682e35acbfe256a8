"""What every family must do: bfloat16, fsdp over eight devices, other image sizes, one program a mode, official names.

Each point is shown for every form of a network that differs in what is compiled, at a size that compiles in a moment.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import backbones
from research.core import sharding
from research.port import checkpoint, names
from tests.backbones import drawn
from tests.backbones.tiny import FORMS

BATCH, CLASSES = 8, 8
# Rounding moves values over the thresholds of quantisers, and whole terms of the gradient with them: less is asked of
# the logits, and of the gradients only those behind the last quantiser.
LEAST_LIKENESS = {"bimlp ternary": 0.5, "bimlp sign": 0.5}
SMOOTH = {"bimlp ternary": ("head", "norm")}


def model(form: str, **changes):
    return backbones.create(FORMS[form].variant, **{**FORMS[form].options, "num_classes": CLASSES, **changes})


def image_size(form: str) -> tuple[int, int]:
    size = getattr(model(form), "img_size", 32)
    return (size, size) if isinstance(size, int) else size


@functools.cache
def batch(form: str):
    """(images, what the logits should be)."""
    rng = np.random.default_rng(1)
    shapes = (BATCH, *image_size(form), 3), (BATCH, CLASSES)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


@functools.cache
def variables(form: str):
    return jax.tree.map(jnp.asarray, drawn.variables(model(form), batch(form)[0]))


def trainer(network):
    """A jitted step: (variables, images, targets, key) -> (loss, logits, gradients, new state)."""

    @jax.jit
    def step(variables, images, targets, key):
        state = {name: tree for name, tree in variables.items() if name != "params"}

        def loss(params):
            rngs = {"dropout": key}
            (logits, _), new = network.apply(
                {"params": params, **state}, images, train=True, rngs=rngs, mutable=list(state)
            )
            return jnp.mean(jnp.square(logits.astype(jnp.float32) - targets)), (logits, new)

        (value, (logits, new)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return value, logits, gradients, new

    return step


@functools.cache
def on_one_device(form: str):
    """The step's results in float32 on one device, from a program that a second step has used too."""
    step = trainer(model(form))
    first = step(variables(form), *batch(form), jax.random.key(2))
    images, targets = batch(form)
    again = step({"params": variables(form)["params"], **first[3]}, images, targets, jax.random.key(3))
    assert step._cache_size() == 1
    if any(getattr(model(form), field, 0) for field in ("drop_path", "drop_rate")):
        assert float(again[0]) != float(first[0])
    return first


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def likeness(a, b) -> float:
    """Cosine of the angle between two trees as vectors."""
    a, b = flat(a), flat(b)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def test_every_family_is_here():
    assert {backbones.family(form.variant).__name__.split(".")[-1] for form in FORMS.values() if form.trains} == set(
        backbones.FAMILIES
    )


TRAINED = [form for form in FORMS if FORMS[form].trains]


@pytest.mark.parametrize("form", TRAINED)
def test_fsdp_on_eight_devices_trains_as_one_device(form):
    mesh, key = sharding.mesh({"fsdp": 8}), jax.random.key(2)
    # Small vectors stay whole: a gather of each would be most of what is compiled.
    placements = sharding.shardings(variables(form), mesh, [(".*", "fsdp")], smallest=64)
    placed = jax.device_put(variables(form), placements)
    for path, leaf in sharding.paths(placed["params"]):
        if leaf.size >= 64 and any(side % 8 == 0 for side in leaf.shape):
            assert leaf.addressable_shards[0].data.size == leaf.size // 8, path
    assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed["params"])) >= 3

    split = jax.device_put(batch(form), sharding.batch_sharding(mesh))
    loss, _, gradients, new = trainer(model(form))(placed, *split, jax.device_put(key, sharding.replicated(mesh)))
    expected_loss, _, expected, expected_new = on_one_device(form)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    norm = np.linalg.norm(flat(expected))
    np.testing.assert_allclose(np.linalg.norm(flat(gradients)), norm, rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5 * max(norm, 1))
    jax.tree.map(close, gradients, expected)
    jax.tree.map(close, new, expected_new)


@pytest.mark.parametrize("form", TRAINED)
def test_bfloat16_trains_near_float32(form):
    step, key = trainer(model(form, dtype=jnp.bfloat16)), jax.random.key(2)
    loss, logits, gradients, new = step(variables(form), *batch(form), key)
    expected_loss, expected_logits, expected, _ = on_one_device(form)
    assert logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((gradients, new))} == {jnp.dtype("float32")}
    assert np.all(np.isfinite(flat(gradients)))
    least = LEAST_LIKENESS.get(form, 0.95)
    np.testing.assert_allclose(loss, expected_loss, rtol=1.05 - least)
    assert likeness(logits.astype(jnp.float32), expected_logits) > least
    parts = SMOOTH.get(form, expected)
    assert likeness({part: gradients[part] for part in parts}, {part: expected[part] for part in parts}) > 0.95


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_is_one_program_in_bfloat16(form):
    images, apply = batch(form)[0], jax.jit(model(form, dtype=jnp.bfloat16).apply)
    logits, endpoints = apply(variables(form), images)
    apply(jax.tree.map(lambda leaf: 2 * leaf, variables(form)), images + 1)
    assert apply._cache_size() == 1
    assert logits.shape == (BATCH, CLASSES) and endpoints["pooled"].ndim == 2
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, endpoints))} == {jnp.dtype("bfloat16")}
    logits = logits.astype(jnp.float32)
    assert np.all(np.isfinite(logits))
    exact = jax.jit(lambda v, x: model(form).apply(v, x)[0])(variables(form), images)
    assert likeness(logits, exact) > LEAST_LIKENESS.get(form, 0.95)


def applied(network, variables, size: tuple[int, int]):
    """(logits, endpoints) of one image of that size, by shape."""
    return jax.eval_shape(network.apply, variables, jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))


@pytest.mark.parametrize("form", FORMS)
def test_another_image_size_is_taken_or_refused_with_the_remedy(form):
    network, (height, width) = model(form), image_size(form)
    other = (height + 12, width + 5)
    if not hasattr(network, "img_size"):
        assert applied(network, variables(form), other)[0].shape == (1, CLASSES)
        return
    said = rf"images are {other[0]}x{other[1]} but .* {height}x{width}: .*img_size=\({other[0]}, {other[1]}\)"
    with pytest.raises(ValueError, match=said):
        applied(network, variables(form), other)
    image = jax.ShapeDtypeStruct((1, *other, 3), jnp.float32)
    larger = model(form, img_size=other)
    (logits, _), _ = jax.eval_shape(lambda x: larger.init_with_output(jax.random.key(0), x), image)
    assert logits.shape == (1, CLASSES)


@pytest.mark.parametrize("form", [form for form in FORMS if not hasattr(model(form), "img_size")])
@pytest.mark.parametrize("side", [1, 7])
def test_a_tiny_image_leaves_no_empty_map_unnoticed(form, side):
    """The mean of a map without pixels would be NaN."""
    try:
        _, endpoints = applied(model(form), variables(form), (side, 32))
    except ValueError as error:
        assert re.search(r"image.* (too small|smaller than|\d+ pixels or more)", str(error))
    else:
        assert all(math.prod(leaf.shape) for leaf in jax.tree.leaves(endpoints))


@pytest.mark.parametrize("form", FORMS)
def test_official_names_there_and_back(form):
    for rules in backbones.family(FORMS[form].variant).NAMES.values():
        state = names.to_official(variables(form), rules)
        back = names.from_official(variables(form), state, rules)
        jax.tree.map(np.testing.assert_array_equal, back, variables(form))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050"])
def test_files_under_official_names_come_back(name, tmp_path):
    tree = drawn.variables(backbones.create(name), jnp.zeros((1, 64, 64, 3)))
    checkpoint.save_official(tree, name, tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_official(name, tmp_path / "w.safetensors"), tree)
