"""Bipartite soft matching and the merge that follows from it, as one op: a kernel keeps similarities in VMEM.

`reference.py` is the meaning and the form that XLA compiles, `tpu.py` the Pallas form for TPUs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.kernels import dispatch
from research.kernels.token_matching import reference, tpu
from research.kernels.token_matching.tpu import Blocks
from research.layers.norm import accumulation_dtype
from research.layers.token_moves import Moves, merge, still

__all__ = ["Blocks", "Merged", "token_matching"]


class Merged(NamedTuple):
    """Tokens (B, M, C) in the dtype that they had, their sizes (B, M) in float32 or better, and the moves."""

    x: jax.Array
    size: jax.Array
    moves: Moves


def token_matching(
    x: jax.Array,
    metric: jax.Array,
    r: int,
    size: jax.Array | None = None,
    *,
    class_token: bool = False,
    distill_token: bool = False,
    form: str | None = None,
    blocks: Blocks | None = None,
    mesh: Mesh | None = None,
) -> Merged:
    """Merges r tokens of each image into those most similar to them: `reference.bipartite`, which says in which order.

    Args:
      x: tokens (B, N, C).
      metric: what they are compared by, (B, N, D), by cosine; no gradient flows through it. Must be finite.
      r: tokens to remove; at most half of those that are not protected are.
      size: how many tokens each stands for (B, N), by which means are weighted; all one by default.
      class_token, distill_token: whether tokens 0 and 1 are such and take no part.
      form, mesh: see `research.kernels.dispatch.run`.
      blocks: the kernel's sizes in place of those of `tpu.BLOCKS`.

    Raises:
      ValueError: shapes that do not fit, a distillation token without the class token before it, an unknown form;
        operands that a kernel asked for does not take: tokens in other dtypes than float32 and bfloat16, keys or sizes
        in others than float32, more tokens than VMEM holds.
    """
    batch, count = x.shape[:2]
    if metric.ndim != 3 or metric.shape[:2] != (batch, count) or (size is not None and size.shape != (batch, count)):
        told = "" if size is None else f" and size {size.shape}"
        raise ValueError(f"x {x.shape} does not fit metric {metric.shape}{told}: all begin with (images, tokens)")
    size = jnp.ones((batch, count)) if size is None else size
    size = size.astype(accumulation_dtype(x))
    r = reference.removable(count, r, class_token, distill_token)
    if r == 0:
        return Merged(x, size, still(batch, count))
    blocks = dispatch.sizes(tpu.BLOCKS, Blocks()) if blocks is None else blocks
    options = {"r": r, "class_token": class_token, "distill_token": distill_token}
    op = dispatch.Op(
        plan=lambda x, metric, size: reference.bipartite(metric, **options),
        apply=lambda moves, x, metric, size: merge(x, moves, size),
        kernel=functools.partial(tpu.token_matching, **options, blocks=blocks),
        refusal=functools.partial(tpu.refusal, blocks=blocks),
    )
    moves, (x, size) = dispatch.run(op, (x, metric, size), form, mesh)
    return Merged(x, size, moves)
