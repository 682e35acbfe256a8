"""The meaning of `token_select`, in jnp: tokens by descending score, those that stay, and what becomes of the rest."""

import jax
import jax.numpy as jnp

from research.layers.token_moves import Moves, lost, ranked, rows


def best(scores: jax.Array, keep: int, protected: int = 0, fuse: bool = False) -> Moves:
    """The step that keeps the `keep` tokens with the highest scores, in descending order; it drops by position.

    Args:
      scores: (B, N - protected), of the tokens behind the first `protected`, which all go on. Equal ones are ranked by
        position, NaN last.
      fuse: the dropped ones join a token at the end; otherwise they are lost.
    """
    order = ranked(scores)
    first = jnp.broadcast_to(jnp.arange(protected, dtype=jnp.int32)[None], (scores.shape[0], protected))
    stay = jnp.concatenate([first, order[:, :keep] + protected], axis=1)
    drop = jnp.sort(order[:, keep:], axis=1) + protected
    return Moves(stay, drop, jnp.full_like(drop, stay.shape[1])) if fuse else lost(stay, drop)


def taken(
    moves: Moves, x: jax.Array, scores: jax.Array, size: jax.Array | None, fuse: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Tokens (B, N, C) and sizes (B, N) after a step of `best` with these scores.

    The fused token is the sum of the dropped ones times their scores, not normalised (Liang et al. 2022, EViT,
    equation 5), as large as they are together.
    """
    tokens = rows(x, moves.keep)
    sizes = None if size is None else rows(size, moves.keep)
    if not fuse:
        return tokens, sizes
    weights = rows(scores, moves.drop - (x.shape[1] - scores.shape[1]))
    fused = jnp.einsum("bn,bnc->bc", weights, rows(x, moves.drop).astype(scores.dtype)).astype(x.dtype)
    if size is not None:
        sizes = jnp.concatenate([sizes, jnp.sum(rows(size, moves.drop), axis=1, keepdims=True)], axis=1)
    return jnp.concatenate([tokens, fused[:, None]], axis=1), sizes
