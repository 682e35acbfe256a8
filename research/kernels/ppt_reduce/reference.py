"""The meaning of `ppt_reduce`, in jnp: of every image the tokens with the lowest scores go, or the most similar merge.

Source: Wu et al. 2023, "PPT: Token Pruning and Pooling for Efficient Vision Transformers" (arXiv 2310.01812).
"""

import jax
import jax.numpy as jnp

from research.kernels.token_matching.reference import bipartite
from research.kernels.token_select.reference import best
from research.layers.token_moves import Moves, choose


def decided(scores: jax.Array, class_tokens: int, threshold: float, reverse: bool) -> tuple[jax.Array, jax.Array]:
    """The unbiased variance (B,) of scores (B, N) behind the first `class_tokens`, and which images it prunes (B,).

    Those where it is at least the threshold; with `reverse` the others.
    """
    variance = jnp.var(scores[:, class_tokens:], axis=1, ddof=1)
    return variance, variance < threshold if reverse else variance >= threshold


def either(scores: jax.Array, metric: jax.Array, pruned: jax.Array, r: int, distilled: bool) -> Moves:
    """The step that loses the r lowest scores (B, N) of images that are pruned and matches keys (B, N, D) of others."""
    prune = best(scores, scores.shape[1] - r)
    return choose(pruned, prune, bipartite(metric, r, class_token=True, distill_token=distilled))
