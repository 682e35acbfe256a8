"""What a step of token reduction does with every token, in index form, and the rows that follow from it.

All methods that prune or merge say the same few things of each image: which tokens go on and in which order, which do
not, and which of the others each of those joins. Counts are the same for all images, so every shape is static.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype


class Moves(NamedTuple):
    """One step from N tokens to M, integers.

    Fields:
      keep: (B, M) positions of the tokens that go on, in the order they have afterwards.
      drop: (B, N - M) positions of the others.
      into: (B, N - M) the position afterwards of the token that each dropped one joins; -1 where it is lost. Position M
        is that of a token made of dropped ones alone, where a method makes one.
    """

    keep: jax.Array
    drop: jax.Array
    into: jax.Array


def still(batch: int, count: int) -> Moves:
    """The step that leaves `count` tokens as they are."""
    keep = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[None], (batch, count))
    return Moves(keep, keep[:, :0], keep[:, :0])


def lost(keep: jax.Array, drop: jax.Array) -> Moves:
    """The step that loses the dropped tokens."""
    return Moves(keep, drop, jnp.full_like(drop, -1))


def choose(condition: jax.Array, yes: Moves, no: Moves) -> Moves:
    """Of each image (B,) the one step or the other; both reduce to the same number of tokens."""
    return jax.tree.map(lambda a, b: jnp.where(condition[:, None], a, b), yes, no)


def ranked(scores: jax.Array) -> jax.Array:
    """Positions (B, N) by descending score; equal scores by position, and scores that are NaN last."""
    scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    return jnp.argsort(-scores, axis=-1, stable=True).astype(jnp.int32)


def rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index` (B, M) of x (B, N, ...): (B, M, ...)."""
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(x, index)


def join(x: jax.Array, moves: Moves, mode: str = "sum") -> jax.Array:
    """Joins rows: (B, N, C) -> (B, M, C), each kept row with those that join it.

    Args:
      mode: `sum`, `mean` (of the kept row and the joining ones, each counted once) or `amax`.
    Raises:
      ValueError: another mode.
    """
    kept, dropped = rows(x, moves.keep), rows(x, moves.drop)
    count = kept.shape[1]
    if mode == "amax":
        # An index past the end is dropped, one before the beginning would count from the end.
        into = jnp.where(moves.into < 0, count, moves.into)
        return jax.vmap(lambda kept, into, dropped: kept.at[into].max(dropped, mode="drop"))(kept, into, dropped)
    if mode not in ("sum", "mean"):
        raise ValueError(f"mode: {mode!r} is none of sum, mean, amax")
    if dropped.shape[1] == 0:
        return kept
    # (B, M, R): a matrix product instead of a scatter, which has no order of its own and is slow on accelerators.
    joins = (moves.into[:, None, :] == jnp.arange(count, dtype=jnp.int32)[None, :, None]).astype(x.dtype)
    total = kept + joins @ dropped
    return total / (1 + jnp.sum(joins, axis=2, keepdims=True)) if mode == "mean" else total


def merge(x: jax.Array, moves: Moves, size: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Joins tokens by their mean weighted with their sizes (Bolya et al. 2023, ToMe, section 3).

    Args:
      x: (B, N, C); its products with the sizes are summed in float32 or better.
      size: (B, N), one each by default.
    Returns:
      tokens (B, M, C) in the dtype of `x`, sizes (B, M).
    """
    wide = x.astype(accumulation_dtype(x))
    size = jnp.ones(x.shape[:2], wide.dtype) if size is None else size.astype(wide.dtype)
    total = join(jnp.concatenate([wide * size[..., None], size[..., None]], axis=-1), moves)
    size = total[..., -1]
    return (total[..., :-1] / size[..., None]).astype(x.dtype), size
