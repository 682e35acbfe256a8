"""`token_matching` for TPUs: a program for a few images, each matched and merged in VMEM.

The even and the odd tokens' keys are separate operands. Similarities are (odd, even), so that what is sought of an
even token, its best and where that is, is found by running down the sublanes and lies along the lanes.
"""

import functools

import jax
import jax.numpy as jnp

from research.kernels import mosaic
from research.kernels.mosaic import Blocks, Rows
from research.layers.token_moves import Moves

# By `device_kind`, see `dispatch.sizes`; none has been tuned on hardware.
BLOCKS: dict[str, Blocks] = {}


def refusal(x: jax.Array, metric: jax.Array, size: jax.Array, blocks: Blocks) -> str | None:
    """Why the kernel cannot take these operands; None where it can."""
    return mosaic.refusal(x, (metric, size), blocks)


def token_matching(
    x: jax.Array,
    metric: jax.Array,
    size: jax.Array,
    r: int,
    class_token: bool,
    distill_token: bool,
    blocks: Blocks,
    interpret: bool = False,
) -> tuple[Moves, tuple[jax.Array, jax.Array]]:
    """Moves, (tokens (B, M, C), sizes (B, M)); of operands without `refusal`, and r of `removable`, 1 or more."""
    _, count, width = x.shape
    left = count - r
    tokens, size, order, into = mosaic.by_image(
        "token_matching",
        functools.partial(_kernel, r=r, class_token=class_token, distill_token=distill_token),
        (x, metric[:, ::2], metric[:, 1::2], size[:, None, :]),
        (Rows(left, width, x.dtype), Rows(1, left), Rows(1, count, jnp.dtype("int32")), Rows(1, r, jnp.dtype("int32"))),
        blocks,
        interpret,
    )
    return Moves(order[:, 0, :left], order[:, 0, left:], into[:, 0]), (tokens, size[:, 0])


def _kernel(x, even, odd, size, out, out_size, order, into, *, r: int, class_token: bool, distill_token: bool):
    for image in range(x.shape[0]):
        places, *moves = match(even[image], odd[image], r, class_token, distill_token)
        order[image], into[image] = (row.astype(jnp.int32) for row in moves)
        out[image], out_size[image] = mosaic.merged(x[image], size[image], places, x.shape[1] - r)


def match(even: jax.Array, odd: jax.Array, r: int, class_token: bool, distill_token: bool) -> tuple[jax.Array, ...]:
    """Of one image's keys at even (E, D) and odd positions (O, D), in rows of whole numbers:

    where every token is afterwards (1, N), the positions of those that stay and then those that do not (1, N), and
    where the latter are afterwards (1, r).
    """
    evens, odds = even.shape[0], odd.shape[0]
    count, left = evens + odds, evens + odds - r
    similarity = jax.lax.dot_general(
        _normalised(odd),
        _normalised(even),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if distill_token:
        similarity = jnp.where(mosaic.rows(odds, evens) > 0, similarity, -jnp.inf)
    best = jnp.max(similarity, axis=0, keepdims=True)
    nearest = jnp.min(
        jnp.where(similarity == best, mosaic.rows(odds, evens), odds - 1.0), axis=0, keepdims=True
    )  # the first of equal ones
    number = mosaic.columns(1, evens)
    if class_token:
        best = jnp.where(number > 0, best, -jnp.inf)
    rank = mosaic.ranks(best)
    goes = rank < r
    stays = mosaic.before(jnp.where(goes, 0.0, 1.0)) if class_token else rank - r
    if distill_token:
        stays = jnp.where(number > 0, stays + 1, stays)
    place = jnp.where(goes, evens - r + nearest, stays)
    slot = mosaic.standing(jnp.where(goes, left + rank, stays))
    standing = mosaic.standing(place)

    # The odd tokens' places do not depend on the image.
    position = mosaic.columns(1, count)
    odd_place = evens - r + (position - 1) * 0.5
    odd_order = 2 * (position - (evens - r)) + 1
    is_odd = position - 2 * jnp.floor(position * 0.5) > 0
    has_odd = (position >= evens - r) & (position < left)
    if distill_token:
        odd_place = jnp.where(position == 1, 1.0, odd_place)
        odd_order = jnp.where(position == 1, 1.0, odd_order)
        has_odd = ((position > evens - r) & (position < left)) | (position == 1)
    twice = 2 * mosaic.rows(evens, 1)
    places = jnp.where(is_odd, odd_place, mosaic.listed(twice, standing, count))
    order = jnp.where(has_odd, odd_order, mosaic.listed(slot, twice, count))
    return places, order, mosaic.listed(slot, standing, r, left)


def _normalised(metric: jax.Array) -> jax.Array:
    length = jnp.sqrt(jnp.sum(metric * metric, axis=1, keepdims=True))
    return metric / jnp.where(length == 0, 1.0, length)
