"""PPT: at a few blocks r tokens go, pruned or pooled, whichever suits the image.

Source: Wu et al. 2023, "PPT: Token Pruning and Pooling for Efficient Vision Transformers" (arXiv 2310.01812); official
code huawei-noah/Efficient-Computing, `Pruning/PPT`, which this follows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.core import sharding
from research.kernels.ppt_reduce import Reduced, ppt_reduce
from research.kernels.ppt_reduce.reference import decided
from research.kernels.token_matching import token_matching
from research.kernels.token_select import token_select
from research.layers.attention import attend
from research.layers.reduction import Reduction, Tokens
from research.layers.token_scores import proportional, shares
from research.tokens import tome
from research.tokens.attention import attended
from research.tokens.moves import finite, follow

POLICIES = ("adaptive", "prune", "pool", "reverse")
FIRST = 2.0  # the score of the class token: above all others, whose sum is 1


class Seen(NamedTuple):
    """What a step is decided by: scores (B, N) with `FIRST` before those of patches, metric (B, N, D)."""

    scores: jax.Array
    metric: jax.Array


def step(
    x: jax.Array,
    size: jax.Array,
    seen: Seen,
    r: int,
    threshold: float,
    policy: str = "adaptive",
    class_tokens: int = 1,
    distilled: bool = False,
) -> Reduced:
    """Removes r tokens of every image by a policy, on the mesh of the program.

    `adaptive` is `research.kernels.ppt_reduce`, which prunes an image where the unbiased variance of its scores is at
    least `threshold` and pools it otherwise.

    Args:
      x, size: tokens (B, N, C) and how many patches each stands for (B, N).
      policy: `adaptive`; `reverse`, which prunes where that pools; `prune` or `pool`, always.
      class_tokens: how many of the first scores are set and no part of the variance.
      distilled: whether the second token takes no part in pooling.
    """
    scores, metric = seen
    mesh = sharding.around(len(x))
    if policy in ("adaptive", "reverse"):
        options = {"reverse": policy == "reverse", "class_tokens": class_tokens, "distilled": distilled, "mesh": mesh}
        return ppt_reduce(x, size, scores, metric, r, threshold, **options)
    if policy == "prune" and r:
        x, size, moves = token_select(x, scores, x.shape[1] - r, size, mesh=mesh)
    else:
        options = {"class_token": True, "distill_token": distilled, "mesh": mesh}
        x, size, moves = token_matching(x, metric, r, size, **options)
    variance = decided(scores, class_tokens, threshold, False)[0]
    return Reduced(x, size, moves, variance, jnp.full(variance.shape, policy == "prune"))


@dataclasses.dataclass(frozen=True)
class PPT(Reduction):
    """See `reduction`; bound to a network, `r`, `threshold` and `policy` have one entry for each of `blocks`."""

    r: int | tuple[int, ...]
    blocks: tuple[int, ...]
    threshold: float | tuple[float, ...]
    policy: str | tuple[str, ...] = "adaptive"
    inflect: float = 0.0
    prop_attn: bool = True
    protect_distilled: bool = False

    def bind(self, depth: int, patches: int, class_token: bool, distilled: bool) -> "PPT":
        if not class_token:
            raise ValueError("PPT scores patches by the class token's attention: it needs class_token=True")
        bound = super().bind(depth, patches, class_token, distilled)
        if wrong := [block for block in self.blocks if not 0 <= block < depth]:
            raise ValueError(f"blocks: {wrong} are not among the {depth} blocks, which count from 0")
        per_block = {
            name: value if isinstance(value, tuple) else (value,) * len(self.blocks)
            for name, value in (("threshold", self.threshold), ("policy", self.policy))
        }
        tokens, counts = patches + bound.prefix, []
        # The schedule has an entry for every block of the network, but only reducing blocks take one, in their order.
        asked = tome.schedule(depth, self.r, self.inflect)[: len(self.blocks)]
        for r, policy in zip(asked, per_block["policy"], strict=True):
            protected = 1 if policy == "prune" and not self.protect_distilled else bound.prefix
            counts.append(tome.removable(tokens, r, protected))
            tokens -= counts[-1]
        return dataclasses.replace(bound, r=tuple(counts), inflect=0.0, **per_block)

    def left(self, block: int, tokens: int) -> int:
        return tokens - self.r[self.blocks.index(block)] if block in self.blocks else tokens

    def overhead(self, block: int, tokens: int, width: int, heads: int) -> int:
        """That of a block which pools, unless it always prunes; an adaptive network lies between the two."""
        if self.left(block, tokens) == tokens:
            return 0
        # The scores, and arithmetic on single numbers (of indices, where it prunes) that the profiler counts too.
        if self.policy[self.blocks.index(block)] == "prune":
            return tokens + 6
        return tokens + 2 + tome.matching_macs(tokens, width, heads)

    def attend(self, tokens: Tokens, block: int, train: bool, q, k, v, bias, scale) -> tuple[jax.Array, Any]:
        size = tokens.size if self.prop_attn else None
        if block not in self.blocks:
            return attend(q, k, v, proportional(bias, size), scale), None
        found = attended(q, k, v, size, bias, scale, class_row=True)
        scores, protected = shares(found.weighted), 2 if self.distilled and self.protect_distilled else 1
        first = jnp.full((scores.shape[0], protected), FIRST, scores.dtype)
        return found.out, Seen(jnp.concatenate([first, scores[:, protected - 1 :]], axis=1), found.keys)

    def reduce(self, tokens: Tokens, block: int, train: bool, seen: Seen | None) -> Tokens:
        if seen is None:
            return tokens
        at = self.blocks.index(block)
        size = tokens.size
        if size is None or not self.prop_attn:  # without proportional attention every step counts from one again
            size = jnp.ones(tokens.x.shape[:2], seen.scores.dtype)
        done = step(
            tokens.x,
            size,
            Seen(finite("scores", seen.scores), seen.metric),
            self.r[at],
            self.threshold[at],
            self.policy[at],
            2 if self.distilled and self.protect_distilled else 1,
            self.distilled,
        )
        tokens = tokens._replace(x=done.x, size=done.size, origin=follow(tokens.origin, done.moves))
        decided = {"scores": seen.scores, "variance": done.variance, "pruned": done.pruned}
        return tokens.noted(block, size=done.size, **decided, **done.moves._asdict())


def reduction(
    r: int | Sequence[int],
    blocks: Sequence[int] = (3, 6, 9),
    threshold: float | Sequence[float] = 7e-5,
    policy: str | Sequence[str] = "adaptive",
    inflect: float = 0.0,
    prop_attn: bool = True,
    protect_distilled: bool = False,
) -> PPT:
    """Prunes or pools r tokens at `blocks` of a ViT: the value for its field `reduce`.

    Adds the endpoints `blockNN_scores`, `_variance`, `_pruned` (booleans), `_size`, `_keep`, `_drop`, `_into`.

    Args:
      r: tokens to remove at every one of `blocks`, or one number for each; at most half of the tokens go at once. With
        `inflect` see `tome.schedule`: as in the official code it runs over all blocks of the network, and reducing
        blocks take its first entries.
      blocks: ascending, from 0.
      threshold: of the variance of the scores; one, or one for each of `blocks`. DeiT-S with r=50: 7e-5 off the shelf,
        6e-5 fine-tuned.
      policy: see `step`; one, or one for each of `blocks`.
      prop_attn: attention weighs keys by their sizes. Off, sizes are forgotten between reducing blocks, as officially.
      protect_distilled: pruning spares the distillation token too. The official code can lose it, and then reads its
        logits from whatever token comes second; pooling always spares it.
    Raises:
      ValueError: blocks that repeat or descend, an unknown policy, a wrong number of entries; at the first use, blocks
        the network has not, a network without class token, more tokens removed than there are.
    """
    blocks = tuple(blocks)
    if list(blocks) != sorted(set(blocks)):
        raise ValueError(f"blocks: {list(blocks)} do not ascend")
    values = {}
    for name, value in (("r", r), ("threshold", threshold), ("policy", policy)):
        values[name] = value if isinstance(value, int | float | str) else tuple(value)
        if isinstance(values[name], tuple) and len(values[name]) != len(blocks):
            raise ValueError(f"{name} has {len(values[name])} entries for {len(blocks)} blocks")
    for name in [values["policy"]] if isinstance(policy, str) else values["policy"]:
        if name not in POLICIES:
            raise ValueError(f"policy: {name!r} is none of {', '.join(POLICIES)}")
    tome.schedule(max(len(blocks), 1), values["r"], inflect)
    return PPT(values["r"], blocks, values["threshold"], values["policy"], inflect, prop_attn, protect_distilled)
