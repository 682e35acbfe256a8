"""Cross-entropies of language models and classifiers of text."""

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype

IGNORED_LABEL = -100


def token_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, a scalar of float32 or better.

    Args:
      logits: (..., V); labels: (...) int; where they are -100 nothing is asked. 0 where nothing is asked at all.
    """
    total, count = token_losses(logits, labels)
    return total / jnp.maximum(count, 1).astype(total.dtype)


def token_losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of the cross-entropies, int32 number of labels asked); arguments as of `token_loss`."""
    logits, asked = logits.astype(accumulation_dtype(logits)), labels != IGNORED_LABEL
    own = jnp.where(asked, labels, 0)[..., None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), own, axis=-1)[..., 0]
    return jnp.sum(jnp.where(asked, losses, 0)), jnp.sum(asked, dtype=jnp.int32)


def next_token_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of each token given those before it, a scalar of float32 or better.

    Args:
      logits: (B, S, V); labels: (B, S) int, the tokens themselves; where they are -100 nothing is asked.
    """
    return token_loss(logits[:, :-1], labels[:, 1:])
