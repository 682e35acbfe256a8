"""CLIP's two towers, by their meaning. Its numbers are checked by tests/port."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import clip
from research.core import optim
from research.layers.mlp import quick_gelu
from research.port import names

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "hidden": 20, "vocabulary": 16}
SMALL |= {"context": 7, "text_width": 8, "text_depth": 2, "text_heads": 2, "text_hidden": 12, "num_classes": 6}
TOKENS = jnp.array([[3, 4, 15, 0, 0, 0], [3, 9, 9, 2, 15, 15], [15, 1, 1, 1, 1, 1]], jnp.int32)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 16, 16, 3))


@pytest.fixture(scope="module")
def variables(images):
    """Random variables, with weights large enough to matter."""
    drawn = jax.jit(clip.build(**SMALL).init)(jax.random.key(0), images)
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, drawn)


@pytest.fixture(scope="module")
def embed(variables, images):
    return jax.jit(lambda tokens: clip.build(**SMALL).apply(variables, images, tokens=tokens))


def test_images_and_texts_meet(embed):
    features, endpoints = embed(TOKENS)
    found = {key: value.shape for key, value in endpoints.items() if key not in ("patch_embed", "block01", "tokens")}
    assert found == {
        "pooled": (2, 12),
        "text_pooled": (3, 8),
        "text_features": (3, 6),
        "image_embeds": (2, 6),
        "text_embeds": (3, 6),
        "logits_per_image": (2, 3),
    }
    np.testing.assert_allclose(np.linalg.norm(endpoints["text_embeds"], axis=1), 1, rtol=1e-5)
    cosines = endpoints["logits_per_image"] * 0.07  # the factor starts at 1 / 0.07
    expected = endpoints["image_embeds"] @ endpoints["text_embeds"].T
    np.testing.assert_allclose(cosines, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(endpoints["image_embeds"] * jnp.linalg.norm(features, axis=1)[:, None], features, 1e-4)


def test_a_text_ends_at_its_first_end_and_what_follows_is_not_read(embed):
    before = embed(TOKENS)[1]["text_features"]
    after = embed(TOKENS.at[0, 3:].set(7).at[1, 5].set(1).at[2, 1:].set(8))[1]["text_features"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    changed = embed(TOKENS.at[:, 0].set(5))[1]["text_features"]
    assert np.abs(changed - before)[:2].max() > 1e-2


def test_padding_is_not_seen():
    seen = jnp.array([[0, 1, 1]], jnp.int32)
    mask = np.asarray(clip.causal_mask(3, seen))[0, 0]
    assert mask.shape == (3, 3) and np.isfinite(mask).all()
    np.testing.assert_array_equal(mask[1:] == 0, [[False, True, False], [False, True, True]])


def test_the_end_is_the_largest_id_unless_it_is_named(variables, images):
    texts = jnp.array([[3, 4, 15, 0]], jnp.int32)

    @jax.jit
    def features(tokens):
        found = (clip.build(**SMALL, eos=eos).apply(variables, images, tokens=tokens) for eos in (None, 15, 4))
        return [endpoints["text_features"] for _, endpoints in found]

    largest, named, other = features(texts)
    np.testing.assert_array_equal(largest, named)
    assert np.abs(other - named).max() > 1e-3


def test_texts_too_long_are_refused(variables, images):
    with pytest.raises(ValueError, match="8 tokens do not fit the 7 positions"):
        apply = lambda tokens: clip.build(**SMALL).apply(variables, images, tokens=tokens)
        jax.eval_shape(apply, jnp.zeros((1, 8), jnp.int32))


@pytest.mark.parametrize("key", ["act_layer", "text_act"])
def test_an_activation_there_is_not_is_refused(key):
    with pytest.raises(ValueError, match=f"{key}: 'swish' is none of gelu, quick_gelu"):
        clip.build(**{key: "swish"})


def test_names_are_those_of_the_published_files(variables):
    state = names.to_official(variables, clip.NAMES["huggingface"])
    shapes = {name: array.shape for name, array in state.items()}
    assert shapes["logit_scale"] == () and shapes["visual_projection.weight"] == (6, 12)
    assert shapes["vision_model.embeddings.class_embedding"] == (12,)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (5, 12)
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (12, 3, 8, 8)
    assert shapes["text_model.encoder.layers.1.self_attn.out_proj.bias"] == (8,)
    assert "vision_model.pre_layrnorm.weight" in shapes and "visual_projection.bias" not in shapes


def test_weight_decay_spares_embeddings_and_the_scale(variables):
    decayed = optim.decayed(variables["params"], clip.NO_DECAY)
    assert not decayed["logit_scale"] and not decayed["text"]["token_embedding"]
    assert decayed["text"]["layers_0"]["attn"]["q_proj"]["kernel"]


def test_quick_gelu_is_a_sigmoid_gate():
    x = jnp.linspace(-3, 3, 7)
    np.testing.assert_allclose(quick_gelu(x), x / (1 + np.exp(-1.702 * x)), rtol=1e-6, atol=1e-7)
    assert quick_gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
