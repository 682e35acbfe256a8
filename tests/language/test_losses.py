"""Cross-entropies against hand calculations, and what is not asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.language.losses import IGNORED_LABEL, next_token_loss, token_loss


def test_nothing_is_asked_where_labels_are_ignored():
    logits = jax.random.normal(jax.random.key(0), (2, 7, 11))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))
    kept = jnp.where(jnp.arange(7)[None] < 4, tokens, IGNORED_LABEL)
    chances = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1], np.asarray(tokens)[:, 1:, None], 2)
    assert float(next_token_loss(logits, kept)) == pytest.approx(-np.mean(chances[:, :3]), rel=1e-5)
    assert float(next_token_loss(logits, jnp.full_like(tokens, IGNORED_LABEL))) == 0.0


def test_classes_are_tokens_too():
    logits = jnp.asarray([[0.0, 1.0], [2.0, 0.0]])
    expected = np.mean([np.log1p(np.exp(1.0)), np.log1p(np.exp(-2.0))])
    assert float(token_loss(logits, jnp.asarray([0, 0]))) == pytest.approx(expected, rel=1e-5)
    assert token_loss(logits.astype(jnp.bfloat16), jnp.asarray([0, 0])).dtype == jnp.float32
