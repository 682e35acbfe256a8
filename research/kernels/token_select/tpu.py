"""`token_select` for TPUs: a program for a few images, whose tokens are ranked by counting and taken by a product."""

import functools

import jax
import jax.numpy as jnp

from research.kernels import mosaic
from research.kernels.mosaic import Blocks, Rows
from research.layers.token_moves import Moves

# By `device_kind`, see `dispatch.sizes`; none has been tuned on hardware.
BLOCKS: dict[str, Blocks] = {}


def refusal(x: jax.Array, scores: jax.Array, size: jax.Array | None, blocks: Blocks) -> str | None:
    """Why the kernel cannot take these operands; None where it can."""
    return mosaic.refusal(x, (scores,) if size is None else (scores, size), blocks)


def token_select(
    x: jax.Array,
    scores: jax.Array,
    size: jax.Array | None,
    keep: int,
    fuse: bool,
    blocks: Blocks,
    interpret: bool = False,
) -> tuple[Moves, tuple[jax.Array, jax.Array | None]]:
    """Moves, (tokens, sizes) as of `reference`; of operands without `refusal`."""
    batch, count, width = x.shape
    protected = count - scores.shape[1]
    left = protected + keep
    # Protected tokens are the best of all.
    scores = jnp.concatenate([jnp.full((batch, protected), jnp.inf, scores.dtype), scores], axis=1)
    sizes = () if size is None else (size[:, None, :],)
    results = [Rows(left + fuse, width, x.dtype), Rows(1, count, jnp.dtype("int32"))]
    tokens, order, *rest = mosaic.by_image(
        "token_select",
        functools.partial(_kernel, left=left, fuse=fuse),
        (x, scores[:, None, :], *sizes),
        results if size is None else [*results, Rows(1, left + fuse)],
        blocks,
        interpret,
    )
    drop = order[:, 0, left:]
    moves = Moves(order[:, 0, :left], drop, jnp.full_like(drop, left if fuse else -1))
    return moves, (tokens, rest[0][:, 0] if rest else None)


def _kernel(x, scores, *rest, left: int, fuse: bool):
    size, (out, order, *out_size) = (rest[0], rest[1:]) if len(rest) == 4 else (None, rest)
    count, width = x.shape[1:]
    for image in range(x.shape[0]):
        place, slot = best(scores[image], left)
        tokens = mosaic.joined(mosaic.joins(jnp.where(place < left, place, -1.0), left + fuse), x[image])
        if fuse:
            weights = mosaic.standing(jnp.where(place < left, 0.0, scores[image]))
            fused = jnp.sum(weights * x[image].astype(jnp.float32), axis=0, keepdims=True)
            tokens = jnp.where(mosaic.rows(left + 1, width) == left, fused, tokens)
        out[image] = tokens.astype(out.dtype)
        slots = mosaic.standing(slot)
        order[image] = mosaic.listed(slots, mosaic.rows(count, 1), count).astype(jnp.int32)
        if size is not None:
            sizes = mosaic.standing(size[image])
            # All that are dropped go to the place behind those that stay.
            out_size[0][image] = mosaic.listed(jnp.minimum(slots, left), sizes, left + fuse)


def best(scores: jax.Array, left: int) -> tuple[jax.Array, jax.Array]:
    """Scores (1, N) -> ranks (1, N), and the same with those from `left` on by position."""
    rank = mosaic.ranks(scores)
    return rank, jnp.where(rank < left, rank, left + mosaic.before(jnp.where(rank < left, 0.0, 1.0)))
