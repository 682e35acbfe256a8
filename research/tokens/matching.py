"""Matchings: which tokens merge into which, by the similarity of their keys. No gradient flows through one.

Source: Bolya et al. 2023 (ToMe, arXiv 2210.09461), section 3 and appendix B; ties and order are those of
facebookresearch/ToMe, `tome/merge.py`, with a stable sort.
"""

import jax
import jax.numpy as jnp

from research.kernels.token_matching.reference import bipartite, normalised
from research.layers.token_moves import Moves, rows, still

__all__ = ["bipartite", "kth_bipartite", "random_bipartite"]


def kth_bipartite(metric: jax.Array, k: int) -> Moves:
    """Merges each token (B, N, D) into the most similar of every k-th: N // k are left, N mod k at the end are lost."""
    batch, count = metric.shape[:2]
    if k <= 1:
        return still(batch, count)
    end = count // k * k
    position = jnp.arange(count, dtype=jnp.int32)
    keep, drop = position[k - 1 : end : k], position[:end].reshape(-1, k)[:, :-1].reshape(-1)
    metric = normalised(metric)
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
    metric = normalised(metric)
    similarity = rows(metric, drop) @ rows(metric, keep).swapaxes(1, 2)
    return Moves(keep, drop, jnp.argmax(similarity, axis=2).astype(jnp.int32))
