"""LLaMA: counts, causality, shared key heads, tied heads, layers alone. Its numbers are checked by tests/port."""

import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import language
from research.core.cost import macs
from research.language import llama

COUNTS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "parameternet" / "counts.json").read_text())
SMALL = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("name", sorted(COUNTS.keys() & llama.VARIANTS.keys()))
def test_counts_are_exact(name):
    model, token = llama.Llama(**llama.VARIANTS[name]), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda t: model.init(jax.random.key(0), t), token)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == COUNTS[name]["params"]
    count = macs(lambda t: model.init_with_output(jax.random.key(0), t)[0], token)
    attention = 2 * model.hidden_size * model.num_hidden_layers  # one token that sees itself
    assert count - attention == COUNTS[name]["macs_per_token_matmul_only"]


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)), jnp.int32)


def drawn(model):
    """Variables large enough for differences to show."""
    return jax.tree.map(lambda x: 8 * x, jax.jit(lambda key: language.init(model, key))(jax.random.key(0)))


def test_a_token_sees_none_after_it(tokens):
    model = llama.Llama(**SMALL, num_experts=2)
    variables, apply = drawn(model), jax.jit(model.apply)
    logits, endpoints = apply(variables, tokens)
    assert endpoints["router_logits"].shape == (2, 14, 2) and endpoints["hidden"].shape == (2, 7, 8)
    other, _ = apply(variables, tokens.at[:, 4].set((tokens[:, 4] + 1) % 11))
    np.testing.assert_allclose(other[:, :4], logits[:, :4], atol=1e-4)
    assert all(float(jnp.max(jnp.abs((other - logits)[:, part]))) > 1e-4 for part in (4, slice(5, None)))


def test_query_heads_share_keys_with_their_neighbours(tokens):
    """Each key head copied for the queries that share it is the model without sharing."""
    options = {**SMALL, "hidden_size": 16, "num_attention_heads": 4}
    shared, plain = (llama.Llama(**options, num_key_value_heads=heads) for heads in (2, None))
    variables = drawn(shared)

    def repeat(path, leaf):
        if not any(getattr(part, "key", "") in ("k_proj", "v_proj") for part in path):
            return leaf
        return jnp.repeat(leaf.reshape(16, 2, 4), 2, axis=1).reshape(16, 16)

    expected, _ = jax.jit(plain.apply)(jax.tree_util.tree_map_with_path(repeat, variables), tokens)
    found, _ = jax.jit(shared.apply)(variables, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert float(jnp.max(jnp.abs(expected))) > 1


def test_layers_on_their_own_make_the_model(tokens):
    """What reconstruction layer by layer relies on, with padding on the left; a tied head is the embeddings'."""
    model = llama.Llama(**SMALL, tie_word_embeddings=True)
    variables, mask = drawn(model), jnp.ones((2, 7), bool).at[0, :3].set(False)
    assert set(variables["params"]) == {"embed_tokens", "layers_0", "layers_1", "norm"}

    @jax.jit
    def by_layers(variables):
        x, shared, _ = model.apply(variables, tokens, mask, method="embed")
        for index in range(2):
            x, _, _ = llama.block(model).apply({"params": variables["params"][f"layers_{index}"]}, x, shared)
        x = model.apply(variables, x, method="finish")
        return x @ variables["params"]["embed_tokens"]["embedding"].T

    logits, endpoints = jax.jit(model.apply)(variables, tokens, mask)
    np.testing.assert_allclose(by_layers(variables), logits, rtol=1e-4, atol=1e-4)
    assert {f"hidden_{i}" for i in range(3)} <= set(endpoints)


def test_bfloat16_computes_near_float32_with_angles_and_sums_in_float32(tokens):
    model = llama.Llama(**SMALL)
    variables = jax.jit(lambda key: language.init(model, key))(jax.random.key(0))
    narrow = model.clone(dtype=jnp.bfloat16)
    text = str(jax.make_jaxpr(narrow.apply)(variables, tokens))
    assert re.search(r":f32\[[\d,]*\] = exp", text) and not re.search(r":bf16\[[\d,]*\] = (exp|cos|sin|rsqrt)\b", text)
    found = jax.jit(narrow.apply)(variables, tokens)[0]
    assert found.dtype == jnp.bfloat16
    expected = np.asarray(jax.jit(model.apply)(variables, tokens)[0])
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.03 * np.abs(expected).max())


def test_configs_of_both_library_versions_are_read():
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = llama.from_config({"rope_theta": 5e5, "rope_scaling": scaling, "num_key_value_heads": 8})
    new = llama.from_config({"rope_parameters": {"rope_theta": 5e5, **scaling}, "num_key_value_heads": 8})
    assert old == new == llama.from_config(llama.to_config(old))
    assert old.rope_theta == 5e5 and dict(old.rope_scaling) == scaling
    with pytest.raises(ValueError, match="rope_type 'yarn' is none of default, linear, llama3"):
        llama.from_config({"rope_scaling": {"rope_type": "yarn", "factor": 2}})


def test_heads_that_do_not_fit_are_refused():
    for more, message in (
        ({"num_attention_heads": 3}, "hidden_size=8 does not divide into 3 heads"),
        ({"num_key_value_heads": 3}, "2 heads of queries do not divide by num_kv_heads=3"),
        ({"hidden_act": "tan"}, "activation 'tan' is none of relu"),
    ):
        with pytest.raises(ValueError, match=message):
            language.shapes(llama.Llama(**{**SMALL, **more}))
