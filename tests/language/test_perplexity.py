"""Perplexity against a hand calculation on a model of word pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.language.perplexity import perplexity

TABLE = jax.random.normal(jax.random.key(0), (7, 7))  # logits of the next token, given one
TOKENS = np.random.default_rng(0).integers(0, 7, 33)


def pairs(table, tokens):
    return table[tokens], {"hidden": tokens}


@pytest.mark.parametrize("batch", [1, 3])
def test_windows_do_not_overlap_and_the_rest_is_dropped(batch):
    chances = np.asarray(jax.nn.log_softmax(TABLE))
    losses = [-chances[TOKENS[i - 1], TOKENS[i]] for i in range(32) if i % 8]  # nothing is asked of a window's first
    assert len(losses) == 4 * 7
    found = perplexity(pairs, TABLE, TOKENS, context=8, batch=batch)
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large():
    plain = lambda table, tokens: jnp.zeros((*tokens.shape, 7), jnp.bfloat16)
    assert perplexity(plain, None, TOKENS, context=8) == pytest.approx(7.0, rel=1e-5)


def test_what_has_no_perplexity_is_refused():
    with pytest.raises(ValueError, match="context=64 tokens a window"):
        perplexity(pairs, TABLE, TOKENS, context=64)
    with pytest.raises(ValueError, match="loss on this text is nan"):
        perplexity(pairs, TABLE * jnp.nan, TOKENS, context=8)
