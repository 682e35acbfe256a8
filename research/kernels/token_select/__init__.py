"""Tokens by rank, the best of them kept and the rest lost or fused, as one op.

`reference.py` is the meaning and the form that XLA compiles, `tpu.py` the Pallas form for TPUs.
"""

import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from research.kernels import dispatch
from research.kernels.token_select import reference, tpu
from research.kernels.token_select.tpu import Blocks
from research.layers.token_moves import Moves

__all__ = ["Blocks", "Selected", "token_select"]


class Selected(NamedTuple):
    """Tokens (B, M, C), their sizes (B, M) where sizes were given, else None, and the moves."""

    x: jax.Array
    size: jax.Array | None
    moves: Moves


def token_select(
    x: jax.Array,
    scores: jax.Array,
    keep: int,
    size: jax.Array | None = None,
    *,
    fuse: bool = False,
    form: str | None = None,
    blocks: Blocks | None = None,
    mesh: Mesh | None = None,
) -> Selected:
    """Keeps the `keep` tokens of each image that have the highest scores, in descending order.

    Args:
      x: tokens (B, N, C). Must be finite: a kernel's products mix those that are not into others of their image.
      scores: (B, P) of the last P tokens; those before them go on in any case. Equal ones are ranked by position, NaN
        last. Only a fused token is differentiable in them.
      keep: how many of the P stay, 0 to P.
      size: how many tokens each stands for (B, N).
      fuse: the others become one token, last: their sum weighted with their scores, not normalised (Liang et al. 2022,
        EViT, equation 5), its size the sum of theirs. Otherwise they are lost. In both cases `moves` lists them by
        position.
      form, mesh: see `research.kernels.dispatch.run`.
      blocks: the kernel's sizes in place of those of `tpu.BLOCKS`.

    A kernel takes kept tokens and sizes as they are, to the bit.

    Raises:
      ValueError: shapes that do not fit, more tokens kept than there are or none left, an unknown form; operands that
        a kernel asked for does not take: tokens in other dtypes than float32 and bfloat16, scores or sizes in others
        than float32, more tokens than VMEM holds.
    """
    batch, count = x.shape[:2]
    patches = scores.shape[-1]
    if scores.shape != (batch, patches) or patches > count or (size is not None and size.shape != (batch, count)):
        told = "" if size is None else f" and size {size.shape}"
        raise ValueError(f"x {x.shape} does not fit scores {scores.shape}{told}: images first, then their tokens")
    if not 0 <= keep <= patches:
        raise ValueError(f"keep={keep} is not between 0 and the {patches} tokens that have scores")
    if patches == count and not keep + fuse:
        raise ValueError("keep=0 leaves no token at all: keep one, or fuse=True")
    blocks = dispatch.sizes(tpu.BLOCKS, Blocks()) if blocks is None else blocks
    op = dispatch.Op(
        plan=lambda x, scores, size: reference.best(scores, keep, count - patches, fuse),
        apply=lambda moves, x, scores, size: reference.taken(moves, x, scores, size, fuse),
        kernel=functools.partial(tpu.token_select, keep=keep, fuse=fuse, blocks=blocks),
        refusal=functools.partial(tpu.refusal, blocks=blocks),
    )
    moves, (x, size) = dispatch.run(op, (x, scores, size), form, mesh)
    return Selected(x, size, moves)
