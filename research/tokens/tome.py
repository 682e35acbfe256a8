"""ToMe: in every block, the most similar tokens are merged.

Source: Bolya et al. 2023 (arXiv 2210.09461), official code facebookresearch/ToMe.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from research.core import sharding
from research.kernels.token_matching import token_matching
from research.layers.reduction import Reduction, Tokens
from research.tokens.attention import attended
from research.tokens.moves import finite, follow


def schedule(depth: int, r: int | Sequence[int], inflect: float = 0.0) -> tuple[int, ...]:
    """Tokens to remove in each of `depth` blocks (official `parse_r`).

    Args:
      r: of every block, or one number a block (none for those left out at the end).
      inflect: slope of a single `r` over the depth, from -1 (2 r to 0, the paper's decreasing schedule) to 1.
    Raises:
      ValueError: more numbers than blocks, negative ones, a slope out of range or with one number a block.
    """
    if isinstance(r, int):
        if not -1 <= inflect <= 1:
            raise ValueError(f"inflect: {inflect} is not between -1 and 1")
        low = int(r * (1.0 - inflect))
        step = (2 * r - low - low) / max(depth - 1, 1)
        counts = tuple(int(low + step * i) for i in range(depth))
    else:
        if inflect:
            raise ValueError("inflect changes a single r; one number a block says it all")
        counts = (*r, *[0] * (depth - len(r)))
    if len(counts) > depth:
        raise ValueError(f"r has {len(counts)} numbers for {depth} blocks")
    if min(counts, default=0) < 0:
        raise ValueError(f"r: {r} removes a negative number of tokens")
    return counts


def removable(tokens: int, r: int, protected: int) -> int:
    """How many of `tokens` a matching removes when asked for r: at most half of those that are not protected.

    Raises:
      ValueError: r is more than there are.
    """
    if r > tokens - protected:
        raise ValueError(f"r={r} removes more tokens than the {tokens - protected} patches that are left: lower r")
    return max(min(r, (tokens - protected) // 2), 0)


def matching_macs(tokens: int, width: int, heads: int) -> int:
    """Multiply-adds of one matching and merge: mean keys, similarities, products with the sizes."""
    head = width // heads
    return tokens * head + (tokens + 1) // 2 * (tokens // 2) * head + tokens * width


@dataclasses.dataclass(frozen=True)
class ToMe(Reduction):
    """See `reduction`; `r` is one number a block once it is bound to a network."""

    r: int | tuple[int, ...]
    inflect: float = 0.0
    prop_attn: bool = True

    def bind(self, depth: int, patches: int, class_token: bool, distilled: bool) -> "ToMe":
        bound = super().bind(depth, patches, class_token, distilled)
        counts, tokens = schedule(depth, self.r, self.inflect), patches + bound.prefix
        for r in counts:
            tokens -= removable(tokens, r, bound.prefix)
        return dataclasses.replace(bound, r=counts, inflect=0.0)

    def left(self, block: int, tokens: int) -> int:
        return tokens - removable(tokens, self.r[block], self.prefix)

    def overhead(self, block: int, tokens: int, width: int, heads: int) -> int:
        return matching_macs(tokens, width, heads) if self.left(block, tokens) < tokens else 0

    def attend(self, tokens: Tokens, block: int, train: bool, q, k, v, bias, scale) -> tuple[jax.Array, Any]:
        seen = attended(q, k, v, tokens.size if self.prop_attn else None, bias, scale, class_row=False)
        return seen.out, seen.keys if self.r[block] else None

    def reduce(self, tokens: Tokens, block: int, train: bool, seen: Any) -> Tokens:
        if not self.r[block]:
            return tokens
        done = token_matching(
            tokens.x,
            finite("keys", seen),
            self.r[block],
            tokens.size,
            class_token=self.class_token,
            distill_token=self.distilled,
            mesh=sharding.around(len(seen)),
        )
        tokens = tokens._replace(x=done.x, size=done.size, origin=follow(tokens.origin, done.moves))
        return tokens.noted(block, size=done.size, **done.moves._asdict())


def reduction(r: int | Sequence[int], inflect: float = 0.0, prop_attn: bool = True) -> ToMe:
    """Merges r tokens in every block of a ViT: the value for its field `reduce`.

    Adds the endpoints `blockNN_size`, `blockNN_keep`, `blockNN_drop`, `blockNN_into` (see `research.tokens.moves`).

    Args:
      r, inflect: see `schedule`. No block removes more than half of the tokens it may.
      prop_attn: attention weighs keys by their sizes; off for networks that were trained with ToMe so, and for MAE.
    Raises:
      ValueError: see `schedule`; at the first use, more tokens removed than there are.
    """
    schedule(1 if isinstance(r, int) else len(r), r, inflect)
    return ToMe(r if isinstance(r, int) else tuple(r), inflect, prop_attn)
