"""LV-ViT against its equations written out, its published sizes, and with tokens reduced."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import backbones
from research.backbones import lvvit
from research.core.cost import macs, params_count
from research.port import names
from research.tokens import ats, dynamicvit, policy_macs, ppt

COUNTS = pathlib.Path(__file__).parents[1] / "golden" / "token_reduction" / "counts.json"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5, "stem_width": 4}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (3, 32, 32, 3))


@pytest.fixture(scope="module")
def variables(images):
    variables = jax.jit(lvvit.build(**TINY).init)(jax.random.key(0), images[:1])
    return jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, variables)


@pytest.fixture(scope="module")
def evaluated(variables, images):
    return jax.jit(lvvit.build(**TINY).apply)(variables, images)


def written_out(params: dict, patches: np.ndarray, skip: float) -> tuple[np.ndarray, np.ndarray]:
    """(tokens after the first block, tokens after the final norm), in float64, branches divided by `skip`."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def attention(x, p):
        q, k, v = (x @ p["qkv"]["kernel"]).reshape(*x.shape[:2], 3, 2, 8).transpose(2, 0, 3, 1, 4)
        weights = np.exp(q @ k.swapaxes(-1, -2) / 8**0.5)
        y = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        return y @ p["proj"]["kernel"] + p["proj"]["bias"]

    def mlp(x, p):
        hidden = np.array(
            jax.nn.gelu((x @ p["fc1"]["kernel"] + p["fc1"]["bias"]).astype(np.float32), approximate=False)
        )
        return hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"]

    x = np.concatenate([np.tile(params["cls_token"], (len(patches), 1, 1)), patches], axis=1) + params["pos_embed"]
    first = None
    for index in range(2):
        block = params[f"blocks_{index}"]
        x = x + attention(norm(x, block["norm1"]), block["attn"]) / skip
        x = x + mlp(norm(x, block["norm2"]), block["mlp"]) / skip
        first = x if first is None else first
    return first, norm(x, params["norm"])


def test_branches_are_divided(variables, evaluated):
    logits, endpoints = evaluated
    first, tokens = written_out(variables["params"], np.asarray(endpoints["patch_embed"]), 2.0)
    np.testing.assert_allclose(endpoints["block01"], first, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(endpoints["tokens"], tokens, rtol=1e-4, atol=1e-4)
    best = np.asarray(endpoints["aux"]).max(axis=1)
    np.testing.assert_allclose(logits, endpoints["head"] + 0.5 * best, rtol=1e-6)


def test_training_gives_the_class_tokens_logits_and_updates_statistics(variables, images):
    run = jax.jit(lambda v, x: lvvit.build(**TINY).apply(v, x, train=True, mutable=["batch_stats"]))
    (logits, endpoints), updates = run(variables, images)
    np.testing.assert_array_equal(logits, endpoints["head"])
    assert float(jnp.max(jnp.abs(updates["batch_stats"]["stem"]["bn3"]["mean"]))) > 0


def test_padding_of_sampled_tokens_is_not_classified(variables, images):
    model = lvvit.build(**TINY, reduce=ats.reduction(at=(1,)))
    logits, endpoints = jax.jit(model.apply)(variables, images)
    real = np.asarray(endpoints["size"][:, 1:, None]) > 0
    assert not real.all()
    best = np.where(real, endpoints["aux"], -np.inf).max(axis=1)
    np.testing.assert_allclose(logits, endpoints["head"] + 0.5 * best, rtol=1e-6)


def test_official_names(variables):
    state = names.to_official(variables, lvvit.NAMES["official"])
    assert state["patch_embed.conv1.weight"].shape == (4, 3, 7, 7) and "patch_embed.bn2.running_var" in state
    assert state["patch_embed.proj.weight"].shape == (16, 4, 4, 4) and "aux_head.bias" in state
    assert "blocks.1.attn.qkv.weight" in state and "blocks.1.attn.qkv.bias" not in state


def test_counts_are_exact():
    entry = json.loads(COUNTS.read_text())["lvvit_s"]
    model, found = backbones.create("lvvit_s"), {}

    def forward(image):
        (logits, _), variables = model.init_with_output(jax.random.key(0), image)
        found["params"] = params_count(variables["params"])
        return logits

    products = macs(forward, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert found["params"] == entry["params"]
    assert policy_macs.lvvit(384, 6, 16) == entry["macs"]
    # What torchprofile counts beside products: batch norms, scaled queries, layer norms.
    assert entry["macs"] - products == 3 * 112**2 * 64 + 16 * 3 * 197 * 384 + 197 * 384


@pytest.mark.parametrize(
    "reduce, published, tokens",
    [(dynamicvit.reduction((4, 8, 12), 0.7), 26.9, 68), (ppt.reduction(50, (4, 8, 12)), 26.2, 49)],
)
def test_reduced_networks_have_the_published_sizes(reduce, published, tokens):
    model, image = backbones.create("lvvit_s", reduce=reduce), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    (logits, ends), found = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)
    assert round(params_count(found["params"]) / 1e6, 1) == published
    assert logits.shape == (1, 1000) and ends["aux"].shape == (1, tokens - 1, 1000)


def test_impossible_requests_are_explained(images):
    with pytest.raises(ValueError, match="classifies its class token"):
        lvvit.build(distilled=True)
    with pytest.raises(ValueError, match="sides of patches are even"):
        lvvit.build(patch_size=7)
    with pytest.raises(ValueError, match=r"32x32 but the model is built for 224x224"):
        jax.eval_shape(lvvit.build().init, jax.random.key(0), images)
