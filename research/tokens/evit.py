"""EViT: patches that the class token hardly looks at are dropped, or fused into one.

Source: Liang et al. 2022, "Not All Patches are What You Need" (arXiv 2202.07800); official code youweiliang/evit.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.core import sharding
from research.kernels.token_select import token_select
from research.layers.attention import attend
from research.layers.reduction import Reduction, Tokens
from research.tokens.attention import attended
from research.tokens.moves import finite, follow


def kept(rate: float, patches: int) -> int:
    """How many of `patches` go on: `ceil(rate * patches)`, in double precision as officially."""
    return math.ceil(rate * patches)


@dataclasses.dataclass(frozen=True)
class EViT(Reduction):
    """See `reduction`."""

    keep_rate: float | tuple[float, ...]
    blocks: tuple[int, ...]
    fuse: bool = True
    protect_distilled: bool = False

    def bind(self, depth: int, patches: int, class_token: bool, distilled: bool) -> "EViT":
        if not class_token:
            raise ValueError("EViT ranks patches by the class token's attention: it needs class_token=True")
        if wrong := [block for block in self.blocks if not 0 <= block < depth]:
            raise ValueError(f"blocks: {wrong} are not among the {depth} blocks, which count from 0")
        return super().bind(depth, patches, class_token, distilled)

    @property
    def protected(self) -> int:
        """Tokens in front that are no patches to this method."""
        return 2 if self.distilled and self.protect_distilled else 1

    def rate(self, block: int) -> float:
        """The share of patches that go on in a block."""
        if block not in self.blocks:
            return 1.0
        return self.keep_rate[self.blocks.index(block)] if isinstance(self.keep_rate, tuple) else self.keep_rate

    def left(self, block: int, tokens: int) -> int:
        patches = tokens - self.protected
        keep = kept(self.rate(block), patches)
        return tokens if keep == patches else self.protected + keep + self.fuse

    def overhead(self, block: int, tokens: int, width: int, heads: int) -> int:
        patches = tokens - self.protected
        dropped = patches - kept(self.rate(block), patches)
        return patches + dropped * width * self.fuse if dropped else 0

    def attend(self, tokens: Tokens, block: int, train: bool, q, k, v, bias, scale) -> tuple[jax.Array, Any]:
        patches = tokens.x.shape[1] - self.protected
        if kept(self.rate(block), patches) == patches:
            return attend(q, k, v, bias, scale), None
        seen = attended(q, k, v, None, bias, scale, class_row=True)
        return seen.out, jnp.mean(seen.row, axis=1)[:, self.protected :]

    def reduce(self, tokens: Tokens, block: int, train: bool, seen: jax.Array | None) -> Tokens:
        if seen is None:
            return tokens
        scores, keep = finite("class attentions", seen), kept(self.rate(block), seen.shape[1])
        mesh = sharding.around(len(seen))
        x, _, moves = token_select(tokens.x, scores, keep, fuse=self.fuse, mesh=mesh)
        tokens = tokens._replace(x=x, origin=follow(tokens.origin, moves))
        return tokens.noted(block, scores=seen, **moves._asdict())


def reduction(
    keep_rate: float | Sequence[float] = 0.7,
    blocks: Sequence[int] = (3, 6, 9),
    fuse: bool = True,
    protect_distilled: bool = False,
) -> EViT:
    """Keeps a share of the patches at `blocks` of a ViT: the value for its field `reduce`.

    Adds the endpoints `blockNN_scores` (of the patches), `_keep`, `_drop`, `_into` (see `research.tokens.moves`).

    Args:
      keep_rate: share that goes on, one for all of `blocks` or one each; 1 changes nothing. `dataclasses.replace` gives
        the same reduction at another rate, as training needs it (`stages`).
      blocks: ascending, from 0.
      fuse: the others become one token instead of none.
      protect_distilled: the distillation token is spared. The official code takes it for a patch, so that its
        classifier may read another token.
    Raises:
      ValueError: a rate outside (0, 1], blocks that repeat or descend, a wrong number of rates; at the first use,
        blocks the network has not, or a network without class token.
    """
    blocks = tuple(blocks)
    if list(blocks) != sorted(set(blocks)):
        raise ValueError(f"blocks: {list(blocks)} do not ascend")
    rates = keep_rate if isinstance(keep_rate, int | float) else tuple(keep_rate)
    if isinstance(rates, tuple) and len(rates) != len(blocks):
        raise ValueError(f"keep_rate has {len(rates)} entries for {len(blocks)} blocks")
    for rate in rates if isinstance(rates, tuple) else [rates]:
        if not 0 < rate <= 1:
            raise ValueError(f"keep_rate: {rate} is not in (0, 1]: a network cannot go on without patches")
    return EViT(rates, blocks, fuse, protect_distilled)


def warmup(step: int, steps_per_epoch: int, base: float = 0.7, start: int = 10, epochs: int = 100) -> float:
    """The keep rate of a training step: 1 before epoch `start`, then a cosine of `epochs` epochs down to `base`."""
    epoch = step // steps_per_epoch
    if epoch < start:
        return 1.0
    if epoch >= start + epochs:
        return base
    return (
        base + (1 - base) * (math.cos(math.pi * (step - start * steps_per_epoch) / (steps_per_epoch * epochs)) + 1) / 2
    )


def stages(
    steps_per_epoch: int, base: float = 0.7, start: int = 10, epochs: int = 100, levels: int = 6
) -> tuple[tuple[int, float], ...]:
    """`warmup` in a few steps, as every rate is a program of its own to compile.

    Args:
      levels: how many rates below 1 there are, evenly spaced down to `base`; each is taken where it is the nearest.
    Returns:
      (first step, rate) of each stage, rates descending from 1.
    """
    rates = [1 - (1 - base) * level / levels for level in range(levels)] + [base]
    found = [(0, 1.0)]
    for step in range(start * steps_per_epoch, (start + epochs) * steps_per_epoch + 1):
        exact = warmup(step, steps_per_epoch, base, start, epochs)
        near = min(rates, key=lambda rate: abs(rate - exact))
        if near < found[-1][1]:
            found.append((step, near))
    return tuple(found)
