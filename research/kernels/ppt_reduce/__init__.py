"""PPT's step as one op: every image is pruned or pooled, whichever the variance of its scores calls for.

`reference.py` is the meaning and the form that XLA compiles, `tpu.py` the Pallas form for TPUs. XLA's form computes
both policies for all images; the kernel computes of each image the one that it needs.
"""

import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from research.kernels import dispatch
from research.kernels.ppt_reduce import reference, tpu
from research.kernels.ppt_reduce.tpu import Blocks
from research.kernels.token_matching.reference import removable
from research.layers.norm import accumulation_dtype
from research.layers.token_moves import Moves, merge, still

__all__ = ["Blocks", "Reduced", "ppt_reduce"]


class Reduced(NamedTuple):
    """Tokens (B, M, C) and sizes (B, M) after a step, its moves, variances (B,), and which images were pruned (B,)."""

    x: jax.Array
    size: jax.Array
    moves: Moves
    variance: jax.Array
    pruned: jax.Array


def ppt_reduce(
    x: jax.Array,
    size: jax.Array,
    scores: jax.Array,
    metric: jax.Array,
    r: int,
    threshold: float,
    *,
    reverse: bool = False,
    class_tokens: int = 1,
    distilled: bool = False,
    form: str | None = None,
    blocks: Blocks | None = None,
    mesh: Mesh | None = None,
) -> Reduced:
    """Removes r tokens of each image by the policy that its scores call for.

    An image is pruned (`token_select`: the rest is ordered by descending score) where the unbiased variance of its
    scores is at least `threshold`, and pooled (`token_matching`, with the class token protected) otherwise. The
    variance, and so the decision, is computed alike in all forms.

    Args:
      x, size: tokens (B, N, C) and how many patches each stands for (B, N).
      scores: (B, N), those of `class_tokens` above all others; NaN last. Without gradient, as the metric is.
      metric: what tokens are compared by, (B, N, D). It and `x` must be finite: a kernel's products mix tokens that are
        not into others of their image.
      r: tokens to remove; at most half of those that pooling may.
      reverse: prunes where that pools.
      class_tokens: how many of the first scores are set and no part of the variance.
      distilled: whether the second token takes no part in pooling.
      form, mesh: see `research.kernels.dispatch.run`.
      blocks: the kernel's sizes in place of those of `tpu.BLOCKS`.

    Raises:
      ValueError: shapes that do not fit, an unknown form; operands that a kernel asked for does not take: tokens in
        other dtypes than float32 and bfloat16, others in others than float32, more tokens than VMEM holds.
    """
    each = x.shape[:2]
    if not size.shape == scores.shape == metric.shape[:2] == each or metric.ndim != 3:
        raise ValueError(
            f"x {x.shape} does not fit size {size.shape}, scores {scores.shape}, metric {metric.shape}: "
            "all begin with (images, tokens)"
        )
    size = size.astype(accumulation_dtype(x))
    variance, pruned = reference.decided(scores, class_tokens, threshold, reverse)
    r = removable(each[1], r, True, distilled)
    if r == 0:
        return Reduced(x, size, still(*each), variance, pruned)
    blocks = dispatch.sizes(tpu.BLOCKS, Blocks()) if blocks is None else blocks
    op = dispatch.Op(
        plan=lambda x, size, scores, metric, pruned: reference.either(scores, metric, pruned, r, distilled),
        apply=lambda moves, x, size, *_: merge(x, moves, size),
        kernel=functools.partial(tpu.ppt_reduce, r=r, distilled=distilled, blocks=blocks),
        refusal=functools.partial(tpu.refusal, blocks=blocks),
    )
    moves, (x, size) = dispatch.run(op, (x, size, scores, metric, pruned), form, mesh)
    return Reduced(x, size, moves, variance, pruned)
