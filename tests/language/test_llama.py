"""LLaMA with and without experts: counts, causality, and what the loss asks. Its numbers are checked by tests/port."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.cost import macs
from research.language import llama

COUNTS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "parameternet" / "counts.json").read_text())
SMALL = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("name", llama.VARIANTS)
def test_counts_are_exact(name):
    model, token = llama.Llama(**llama.VARIANTS[name]), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda t: model.init(jax.random.key(0), t), token)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == COUNTS[name]["params"]
    count = macs(lambda t: model.init_with_output(jax.random.key(0), t)[0], token)
    attention = 2 * model.hidden_size * model.num_hidden_layers  # one token that sees itself
    assert count - attention == COUNTS[name]["macs_per_token_matmul_only"]


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))


def test_a_token_sees_none_after_it(tokens):
    model = llama.Llama(**SMALL, num_experts=2)
    variables = jax.tree.map(lambda x: 8 * x, jax.jit(model.init)(jax.random.key(0), tokens))
    apply = jax.jit(model.apply)
    logits, endpoints = apply(variables, tokens)
    assert endpoints["router_logits"].shape == (2, 14, 2) and endpoints["hidden"].shape == (2, 7, 8)
    other, _ = apply(variables, tokens.at[:, 4].set((tokens[:, 4] + 1) % 11))
    np.testing.assert_allclose(other[:, :4], logits[:, :4], atol=1e-4)
    assert all(float(jnp.max(jnp.abs((other - logits)[:, part]))) > 1e-4 for part in (4, slice(5, None)))


def test_rotation_depends_on_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (6,)) for i in (0, 1))
    turned = [llama.rotate(jnp.tile(x, (5, 1))) for x in (q, k)]
    scores = np.asarray(turned[0] @ turned[1].T)
    for shift in range(4):
        np.testing.assert_allclose(np.diag(scores, shift), np.diag(scores, shift)[0], rtol=1e-4, atol=1e-5)


def test_nothing_is_asked_where_labels_are_ignored(tokens):
    logits = jax.random.normal(jax.random.key(0), (2, 7, 11))
    kept = jnp.where(jnp.arange(7)[None] < 4, tokens, llama.IGNORED_LABEL)
    expected = -np.mean(
        np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :3], np.asarray(tokens)[:, 1:4, None], 2)
    )
    assert float(llama.next_token_loss(logits, kept)) == pytest.approx(expected, rel=1e-5)
    assert float(llama.next_token_loss(logits, jnp.full_like(tokens, -100))) == 0.0


def test_heads_that_do_not_fit_are_refused(tokens):
    with pytest.raises(ValueError, match="hidden_size=8 does not divide into 3 heads"):
        jax.eval_shape(llama.Llama(**{**SMALL, "num_attention_heads": 3}).init, jax.random.key(0), tokens)
