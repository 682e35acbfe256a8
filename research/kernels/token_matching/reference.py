"""The meaning of `token_matching`, in jnp: bipartite soft matching, and the mean of the tokens that it joins.

Source: Bolya et al. 2023 (ToMe, arXiv 2210.09461), section 3 and appendix B; ties and order are those of
facebookresearch/ToMe, `tome/merge.py`, with a stable sort. No gradient flows through a matching.
"""

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype
from research.layers.token_moves import Moves, ranked, rows, still


def removable(count: int, r: int, class_token: bool, distill_token: bool) -> int:
    """How many of `count` tokens a matching removes when asked for r: at most half of those that are not protected.

    Raises:
      ValueError: a distillation token without the class token before it.
    """
    if distill_token and not class_token:
        raise ValueError("distill_token=True needs class_token=True: the distillation token is the second of the two")
    return max(min(r, (count - class_token - distill_token) // 2), 0)


def bipartite(metric: jax.Array, r: int, class_token: bool = False, distill_token: bool = False) -> Moves:
    """Merges the r tokens at even positions that are most similar to one at an odd position into that one.

    Output order: the even ones that are left, by position (by descending similarity without a class token), then all
    odd ones; with a distillation token `[even 0, odd 0, even 1.., odd 1..]`.

    Args:
      metric: (B, N, D), compared by cosine.
      r: tokens to remove; see `removable`.
      class_token, distill_token: whether tokens 0 and 1 are such and take no part.
    Raises:
      ValueError: a distillation token without the class token before it.
    """
    batch, count = metric.shape[:2]
    r = removable(count, r, class_token, distill_token)
    if r == 0:
        return still(batch, count)
    metric = normalised(metric)
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


def normalised(metric: jax.Array) -> jax.Array:
    """Rows of length 1, without gradient; a row of zeros, which has no direction, stays as it is."""
    metric = jax.lax.stop_gradient(metric.astype(accumulation_dtype(metric)))
    length = jnp.sqrt(jnp.sum(jnp.square(metric), axis=-1, keepdims=True))
    return metric / jnp.where(length == 0, 1, length)
