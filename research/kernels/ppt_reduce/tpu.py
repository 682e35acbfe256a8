"""`ppt_reduce` for TPUs: a program for a few images, each of which is ranked or matched, and then merged, in VMEM."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from research.kernels import mosaic
from research.kernels.mosaic import Blocks, Rows
from research.kernels.token_matching.tpu import match
from research.kernels.token_select.tpu import best
from research.layers.token_moves import Moves

# By `device_kind`, see `dispatch.sizes`; none has been tuned on hardware.
BLOCKS: dict[str, Blocks] = {}


def refusal(x: jax.Array, size, scores, metric, pruned, blocks: Blocks) -> str | None:
    """Why the kernel cannot take these operands; None where it can."""
    return mosaic.refusal(x, (size, scores, metric), blocks)


def ppt_reduce(
    x: jax.Array,
    size: jax.Array,
    scores: jax.Array,
    metric: jax.Array,
    pruned: jax.Array,
    r: int,
    distilled: bool,
    blocks: Blocks,
    interpret: bool = False,
) -> tuple[Moves, tuple[jax.Array, jax.Array]]:
    """Moves, (tokens (B, M, C), sizes (B, M)); of operands without `refusal`, and r of 1 or more."""
    count, width = x.shape[1:]
    left = count - r
    whole = jnp.dtype("int32")
    tokens, size, order, into = mosaic.by_image(
        "ppt_reduce",
        functools.partial(_kernel, r=r, distilled=distilled),
        (x, size[:, None, :], scores[:, None, :], metric[:, ::2], metric[:, 1::2], pruned.astype(jnp.int32)),
        (Rows(left, width, x.dtype), Rows(1, left), Rows(1, count, whole), Rows(1, r, whole)),
        blocks,
        interpret,
    )
    return Moves(order[:, 0, :left], order[:, 0, left:], into[:, 0]), (tokens, size[:, 0])


def _kernel(x, size, scores, even, odd, pruned, out, out_size, order, into, *, r: int, distilled: bool):
    images, count, _ = x.shape
    for image in range(images):
        places, *moves = jax.lax.cond(
            pruned[pl.program_id(0) * images + image] > 0,
            lambda image=image: _prune(scores[image], r),
            lambda image=image: match(even[image], odd[image], r, True, distilled),
        )
        order[image], into[image] = (row.astype(jnp.int32) for row in moves)
        out[image], out_size[image] = mosaic.merged(x[image], size[image], places, count - r)


def _prune(scores: jax.Array, r: int) -> tuple[jax.Array, ...]:
    """As `match`, of scores (1, N)."""
    count = scores.shape[1]
    place, slot = best(scores, count - r)
    order = mosaic.listed(mosaic.standing(slot), mosaic.rows(count, 1), count)
    return jnp.where(place < count - r, place, -1.0), order, jnp.full((1, r), -1.0)
