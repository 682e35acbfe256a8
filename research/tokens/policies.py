"""Attention under a keep policy: tokens that were dropped stay in place and are seen by nobody but themselves.

Source: Rao et al. 2021 (DynamicViT, arXiv 2106.02034), equations 10-11; the smoothing is the official code's.
"""

import jax
import jax.numpy as jnp

from research.layers.attention import attention_scores
from research.layers.norm import accumulation_dtype

EPSILON = 1e-6


def behind(prefix: int, order: jax.Array) -> jax.Array:
    """Positions (B, P) among the patches as positions (B, prefix + P) among all tokens, the first ones before them."""
    first = jnp.broadcast_to(jnp.arange(prefix, dtype=order.dtype)[None], (order.shape[0], prefix))
    return jnp.concatenate([first, order + prefix], axis=1)


def softmax(scores: jax.Array, policy: jax.Array, epsilon: float = EPSILON) -> jax.Array:
    """Softmax of scores (B, heads, N, N) over the keys that `policy` (B, N), 1 or 0, keeps.

    Every token sees itself. With e the exponentials so masked, `(e + epsilon / N) / (sum e + epsilon)`, in float32 or
    better, returned in the dtype of the scores. Differentiable in the policy.
    """
    masked, total = _masked(scores, policy)
    return ((masked + epsilon / scores.shape[-1]) / (total + epsilon)).astype(scores.dtype)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    policy: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    epsilon: float = EPSILON,
) -> jax.Array:
    """`softmax(scale q k^T + bias, policy) v`: (B, heads, N, D), normalised after the product with the values.

    Args:
      q, k, v: (B, heads, N, D).
      policy: (B, N), 1 for tokens that are seen, 0 for others.
      bias, scale: as of `research.layers.attention.attend`.
    """
    scores = attention_scores(q, k, bias, scale)
    masked, total = _masked(scores, policy)
    wide = v.astype(total.dtype)
    values = (masked.astype(v.dtype) @ v).astype(total.dtype)
    rest = epsilon / scores.shape[-1] * jnp.sum(wide, axis=-2, keepdims=True)
    return ((values + rest) / (total + epsilon)).astype(v.dtype)


def _masked(scores: jax.Array, policy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Exponentials (B, heads, N, N) without the keys the policy drops, and their sums (B, heads, N, 1)."""
    scores = scores.astype(accumulation_dtype(scores))
    policy = policy.astype(scores.dtype)[:, None, None, :]
    itself = jnp.eye(scores.shape[-1], dtype=bool)[None, None]
    exponentials = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    masked = exponentials * jnp.where(itself, jnp.ones_like(policy), policy)
    return masked, jnp.sum(masked, axis=-1, keepdims=True)
