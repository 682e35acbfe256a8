"""Bipartite soft matching: which tokens merge into which, by the similarity of their keys.

Source: Bolya et al. 2023 (ToMe, arXiv 2210.09461), section 3 and appendix B; ties and order are those of
facebookresearch/ToMe, `tome/merge.py`, with a stable sort. No gradient flows through a matching.
"""

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype
from research.tokens.moves import Moves, ranked, rows, still


def bipartite(metric: jax.Array, r: int, class_token: bool = False, distill_token: bool = False) -> Moves:
    """Merges the r tokens at even positions that are most similar to one at an odd position into that one.

    Output order: the even ones that are left, by position (by descending similarity without a class token), then all
    odd ones; with a distillation token `[even 0, odd 0, even 1.., odd 1..]`.

    Args:
      metric: (B, N, D), compared by cosine.
      r: tokens to remove; at most half of those that are not protected are.
      class_token, distill_token: whether tokens 0 and 1 are such and take no part.
    Raises:
      ValueError: a distillation token without the class token before it.
    """
    if distill_token and not class_token:
        raise ValueError("distill_token=True needs class_token=True: the distillation token is the second of the two")
    batch, count = metric.shape[:2]
    r = min(r, (count - class_token - distill_token) // 2)
    if r <= 0:
        return still(batch, count)
    metric = _normalised(metric)
    similarity = metric[:, ::2] @ metric[:, 1::2].swapaxes(1, 2)
    if class_token:
        similarity = similarity.at[:, 0, :].set(-jnp.inf)
    if distill_token:
        similarity = similarity.at[:, :, 0].set(-jnp.inf)
    order = ranked(jnp.max(similarity, axis=2))
    nearest = jnp.argmax(similarity, axis=2).astype(jnp.int32)
    source, left = order[:, :r], order[:, r:]
    left = jnp.sort(left, axis=1) if class_token else left
    target = rows(nearest, source)

    even, odd = 2 * left, jnp.arange(1, count, 2, dtype=jnp.int32)
    odd = jnp.broadcast_to(odd[None], (batch, odd.size))
    into = target + left.shape[1]
    if not distill_token:
        return Moves(jnp.concatenate([even, odd], 1), 2 * source, into)
    # The first odd one, which nothing joins, moves to the front; all others keep their places.
    keep = jnp.concatenate([even[:, :1], odd[:, :1], even[:, 1:], odd[:, 1:]], 1)
    return Moves(keep, 2 * source, into)


def kth_bipartite(metric: jax.Array, k: int) -> Moves:
    """Merges each token (B, N, D) into the most similar of every k-th: N // k are left, N mod k at the end are lost."""
    batch, count = metric.shape[:2]
    if k <= 1:
        return still(batch, count)
    end = count // k * k
    position = jnp.arange(count, dtype=jnp.int32)
    keep, drop = position[k - 1 : end : k], position[:end].reshape(-1, k)[:, :-1].reshape(-1)
    metric = _normalised(metric)
    into = jnp.argmax(metric[:, drop] @ metric[:, keep].swapaxes(1, 2), axis=2).astype(jnp.int32)
    keep, drop, tail = (jnp.broadcast_to(i[None], (batch, i.size)) for i in (keep, drop, position[end:]))
    return Moves(keep, jnp.concatenate([drop, tail], 1), jnp.concatenate([into, jnp.full_like(tail, -1)], 1))


def random_bipartite(metric: jax.Array, r: int, key: jax.Array) -> Moves:
    """Merges r tokens drawn at random into the most similar of the others, which follow in random order."""
    batch, count = metric.shape[:2]
    if r <= 0:
        return still(batch, count)
    order = jnp.argsort(jax.random.uniform(key, (batch, count)), axis=1).astype(jnp.int32)
    drop, keep = order[:, :r], order[:, r:]
    metric = _normalised(metric)
    similarity = rows(metric, drop) @ rows(metric, keep).swapaxes(1, 2)
    return Moves(keep, drop, jnp.argmax(similarity, axis=2).astype(jnp.int32))


def _normalised(metric: jax.Array) -> jax.Array:
    """Rows of length 1, without gradient; a row of zeros, which has no direction, stays as it is."""
    metric = jax.lax.stop_gradient(metric.astype(accumulation_dtype(metric)))
    length = jnp.sqrt(jnp.sum(jnp.square(metric), axis=-1, keepdims=True))
    return metric / jnp.where(length == 0, 1, length)
