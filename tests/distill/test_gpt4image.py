"""GPT4Image's losses from their definitions, heads by parameter counts, the hint's batch, and training with texts."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import train
from research import backbones
from research.core import config as configs
from research.core import scope
from research.distill import gpt4image, text_targets

ROOT = pathlib.Path(__file__).parents[2]
COUNTS = json.loads((ROOT / "tests/golden/gpt4image/counts.json").read_text())
RNG = np.random.default_rng(0)
B, D = 8, 5
IMAGE = jnp.asarray(RNG.normal(size=(B, D)), jnp.float32)
TEXT = RNG.normal(size=(B, D))
TEXT = jnp.asarray(TEXT / np.linalg.norm(TEXT, axis=1, keepdims=True), jnp.float32)
TEXT = TEXT.at[3].set(TEXT[1])  # two crops of one image bring one text twice


def test_losses_are_their_definitions():
    z = np.asarray(IMAGE, np.float64) / np.linalg.norm(IMAGE, axis=1, keepdims=True)
    e, tau = np.asarray(TEXT, np.float64), 0.07
    logits = z @ e.T / tau
    rows = np.log(np.sum(np.exp(logits), 1)) - np.diag(logits)
    columns = np.log(np.sum(np.exp(logits), 0)) - np.diag(logits)
    np.testing.assert_allclose(gpt4image.byol(IMAGE, TEXT), np.sum((z - e) ** 2, -1), rtol=1e-5)
    np.testing.assert_allclose(gpt4image.ctr(IMAGE, TEXT, tau=tau), rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gpt4image.clip(IMAGE, TEXT, tau=tau), (rows + columns) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", gpt4image.TEXT_LOSSES)
@pytest.mark.parametrize("image", [TEXT, 0 * TEXT, 1e4 * TEXT, TEXT[:1], TEXT[:, :2].astype(jnp.bfloat16)])
def test_gradients_are_finite_at_the_extremes(name, image):
    text = gpt4image.unit(TEXT[: len(image), : image.shape[1]])
    loss = lambda z, e: jnp.mean(gpt4image.TEXT_LOSSES[name](z, e))
    value, gradients = jax.value_and_grad(loss, (0, 1))(image, text)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert np.all(np.isfinite(gradients[0].astype(jnp.float32))) and not np.any(gradients[1])


@pytest.mark.parametrize("name", [name for name in COUNTS if name in backbones.variants()])
def test_networks_with_heads_have_the_official_counts(name):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    model = backbones.create(name)
    shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)
    (_, endpoints), variables = shapes
    norm = name.startswith("resnet")
    build = gpt4image.hint(norm=norm)
    text = {"text": jax.ShapeDtypeStruct((1, 1024), jnp.float32)}
    params, _ = jax.eval_shape(lambda key: build.init(key, endpoints, text), jax.random.key(0))
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    assert size(variables["params"]) == COUNTS[name]["params"]
    assert size(variables["params"]) + size(params) == COUNTS[name]["params_with_mlp_proj1024"]


@pytest.mark.parametrize("kind, norm", [("mlp", True), ("mlp", False), ("linear", True)])
def test_initial_heads_follow_the_authors(kind, norm):
    std = 1 / 32 if norm else 0.02
    head = gpt4image.TextHead(64, kind, norm=norm, init_std=std)
    params = jax.jit(head.init)(jax.random.key(0), jnp.zeros((2, 100)))["params"]
    kernel = params["linear" if kind == "linear" else "fc1"]["kernel"]
    assert np.std(kernel) == pytest.approx(std, rel=0.05)
    if kind == "linear":
        assert set(params) == {"linear"} and set(params["linear"]) == {"kernel"}
    else:
        assert params["fc1"]["kernel"].shape == (100, 128) and ("bias" in params["fc1"]) == (not norm)
        assert 0.8 / 128**0.5 < np.max(np.abs(params["fc2"]["bias"])) <= 1 / 128**0.5


def hint_value(loss, group, devices=1):
    hint = gpt4image.hint(loss=loss, norm=False, group=group)
    seen = {"pooled": IMAGE}, {"text": TEXT}
    params, state = hint.init(jax.random.key(0), *seen)

    def share(*seen):
        with scope.batch_axis("data" if devices > 1 else None):
            function = lambda params: hint.apply(params, state, *seen)[0]
            return scope.mean(jax.value_and_grad(function)(params))

    if devices == 1:
        return jax.jit(share)(*seen)
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), seen)
    found = jax.pmap(share, "data", devices=jax.devices()[:devices])(*split)
    return jax.tree.map(lambda x: x[0], found)


@pytest.mark.parametrize("loss", gpt4image.TEXT_LOSSES)
def test_the_batch_is_the_same_on_one_device_and_on_several(loss):
    one, several = hint_value(loss, 2), hint_value(loss, 2, devices=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, several)
    # Only `ctr` contrasts a GPU's share; `clip` gathers everyone's, and `byol` has no contrast.
    assert (abs(float(one[0] - hint_value(loss, None)[0])) > 1e-3) == (loss == "ctr")


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="choose one of byol, ctr, clip"):
        gpt4image.hint(loss="info")
    with pytest.raises(ValueError, match="choose one of mlp, linear"):
        gpt4image.hint(kind="deep")
    with pytest.raises(ValueError, match="no endpoint 'text'"):
        gpt4image.hint().init(jax.random.key(0), {"pooled": IMAGE}, {"logits": IMAGE})


def test_texts_reach_the_loss_by_index_and_the_plain_arm_not(tmp_path):
    """The text arm's loss exceeds the plain one's by its weighted loss of the rows that `rows[index]` names."""
    c = configs.load(str(ROOT / "configs/distill/gpt4image_r50.py:smoke"))
    data = train.open_data(c)
    rng = np.random.default_rng(1)
    targets = text_targets.align(rng.normal(size=(10, 6)).astype(np.float32), None, data.train)
    text_targets.save(tmp_path / "targets.npz", targets)
    with c.unlocked():
        c.teacher.text = str(tmp_path / "targets.npz")
        c.students.text.hint_options.update({"loss": "byol", "norm": False})
        c.students.text.hint_weight = 2.0
    c = train.resolve(c, data)
    bound = train.runner.build(train.build(c, data), devices=jax.devices()[:1])
    state = bound.init(jax.random.PRNGKey(0))
    np.testing.assert_array_equal(state.frozen["text"]["rows"], data.train.labels)
    batch = next(train.batches(c, data)[0](0))

    # With a constant head the loss is known: 2 - 2 cos of the head's last bias and the rows of the batch.
    adaptor = state.params["text"]["adaptor"]
    bias = jax.device_get(adaptor["fc2"]["bias"])
    constant = {**adaptor, "fc2": {**adaptor["fc2"], "kernel": 0 * adaptor["fc2"]["kernel"]}}
    state = state.replace(params={**state.params, "text": {**state.params["text"], "adaptor": constant}})
    _, metrics = bound.train_step(state, bound.put(batch))
    found = float(metrics["text/loss"][0] - metrics["none/loss"][0]) / 2.0
    rows = targets.embeddings.astype(np.float16).astype(np.float32)[data.train.labels[batch["index"]]]
    expected = np.mean(2 - 2 * rows @ (bias / np.linalg.norm(bias)))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_configs_have_the_published_weights():
    weights = {}
    for name in ("r50", "deit_b", "convnext_t"):
        c = configs.load(str(ROOT / f"configs/distill/gpt4image_{name}.py"))
        text = c.students.text
        weights[name] = (text.hint_weight, text.hint_options.tau, text.group, c.batch_size)
        assert not c.students.none.hint and c.teacher.model == ""
    assert weights["r50"] == (0.075, 0.2, 256, 1024)
    assert weights["deit_b"] == (0.0375, 0.05, 128, 1024)
    c = configs.load(str(ROOT / "configs/distill/gpt4image_r50.py:arms=text,loss=ctr"))
    assert list(c.students) == ["text"] and c.students.text.hint_options.loss == "ctr"
    with pytest.raises(ValueError, match="no arm 'caption'"):
        configs.load(str(ROOT / "configs/distill/gpt4image_r50.py:arms=caption"))
