"""ATS, adaptive token sampling: each image keeps as many tokens as its scores ask for, without any training.

Source: Fayyaz et al. 2022 (arXiv 2111.15667), section 3, and the official code (adaptivetokensampling/ATS). Tokens are
sampled where uniform steps along the cumulative score hit it, so that a few large scores are hit by many steps and
leave few tokens, and even scores leave many. The number differs from image to image: here tokens stay in arrays of a
fixed length whose first rows are the survivors and whose rest is padding, marked by a size of zero.

The official code pads a batch to its longest image, and the padding takes part in the scores of the others. Here each
image is treated as if it were alone. Its softmax adds 1e-6 to guard against images without tokens, which cannot occur
while the class token stays; it is left out.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.layers.attention import attend
from research.layers.norm import accumulation_dtype
from research.layers.reduction import Reduction, Tokens
from research.layers.token_scores import significance
from research.tokens.moves import finite, follow, lost, rows
from research.tokens.policies import behind


class Sample(NamedTuple):
    """What is left of P patches: `order` (B, P) of them, survivors first and the best of these last; `kept` (B, P) says
    which entries of the order survive."""

    order: jax.Array
    kept: jax.Array


def cumulated(scores: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores of patches (B, P) in ascending order and their cumulative sum, brought to [0, 1].

    Args:
      valid: (B, P) booleans; padding is put first and has a sum of 0.
    Returns:
      (sorted scores, their indices, normalised sums), each (B, P).
    """
    valid = jnp.ones(scores.shape, bool) if valid is None else valid
    order = jnp.argsort(jnp.where(valid, scores, -jnp.inf), axis=1, stable=True)
    scores, valid = (jnp.take_along_axis(x, order, axis=1) for x in (jnp.where(valid, scores, 0), valid))
    sums = jnp.cumsum(scores, axis=1)
    low = jnp.min(jnp.where(valid, sums, jnp.inf), axis=1, keepdims=True)
    span = sums[:, -1:] - low
    # Patches that all score zero, or a single one: the last is as good as any.
    last = (jnp.arange(scores.shape[1]) == scores.shape[1] - 1).astype(sums.dtype)[None]
    normalised = jnp.where(span > 0, (sums - low) / jnp.where(span > 0, span, 1), last)
    return scores, order, jnp.where(valid, normalised, 0)


def targets(sums: jax.Array, count: int) -> jax.Array:
    """Where the sums (B, P) are sampled: `count` even steps from the smallest sum above zero to 1, (B, count).

    Raises:
      ValueError: fewer than two steps.
    """
    if count < 2:
        raise ValueError(f"sampling takes two steps or more, not {count}")
    start = jnp.min(jnp.where(sums > 0, sums, jnp.inf), axis=1, keepdims=True)
    return start + jnp.arange(count, dtype=sums.dtype)[None] / (count - 1) * (1 - start)


def sample(scores: jax.Array, count: int, *, valid: jax.Array | None = None, most: int | None = None) -> Sample:
    """The patches nearest to the steps of `targets` (section 3.2, inverse transform sampling).

    Args:
      scores: (B, P), not negative.
      count: steps. Where there are fewer than patches, only the `count` best are candidates, as in the official code.
      valid: (B, P) booleans, False for padding.
      most: largest number of survivors; the worst beyond it are dropped.
    Raises:
      ValueError: fewer than two steps.
    """
    patches = scores.shape[1]
    _, ascending, sums = cumulated(jax.lax.stop_gradient(scores.astype(accumulation_dtype(scores))), valid)
    steps = targets(sums, count)
    # A step picks the patch whose sum is nearest, the first of equals: entry j is picked by the steps between the
    # midpoints to its neighbours, so it survives where the number of steps up to its upper midpoint grows.
    first = max(patches - count, 0)
    middle = (sums[:, first + 1 :] + sums[:, first:-1]) / 2
    below = jnp.sum(steps[:, None, :] <= middle[:, :, None], axis=-1)
    below = jnp.concatenate([below, jnp.full_like(below, count, shape=(below.shape[0], 1))], axis=1)
    hit = jnp.diff(below, axis=1, prepend=0) > 0
    hit = jnp.concatenate([jnp.zeros((hit.shape[0], first), bool), hit], axis=1)

    place = jnp.arange(patches)[None]
    survivors_first = jnp.sort(jnp.where(hit, place, place + patches), axis=1) % patches
    found = jnp.sum(hit, axis=1, keepdims=True)
    left = jnp.minimum(found, patches if most is None else most)
    chosen = rows(survivors_first, (place + found - left) % patches)
    return Sample(rows(ascending, chosen), place < left)


@dataclasses.dataclass(frozen=True)
class ATS(Reduction):
    """See `reduction`; `steps` is the number of patches the network begins with. A token of size 0 is padding."""

    at: tuple[int, ...]
    most: tuple[int | None, ...]
    steps: int = 0

    def bind(self, depth: int, patches: int, class_token: bool, distilled: bool) -> "ATS":
        if not class_token:
            raise ValueError("ATS scores patches by the class token's attention: use class_token=True")
        if self.at[-1] >= depth:
            raise ValueError(f"at={self.at}: the network has {depth} blocks, counted from 0")
        if patches < 2:
            raise ValueError(f"ATS samples among two patches or more, not {patches}")
        return dataclasses.replace(super().bind(depth, patches, class_token, distilled), steps=patches)

    def left(self, block: int, tokens: int) -> int:
        most = self.most[self.at.index(block)] if block in self.at else None
        return tokens if most is None else min(tokens, self.prefix + most)

    def start(self, x: jax.Array) -> Tokens:
        return super().start(x)._replace(size=jnp.ones(x.shape[:2], accumulation_dtype(x)))

    def attend(self, tokens: Tokens, block: int, train: bool, q, k, v, bias, scale) -> tuple[jax.Array, Any]:
        if block > self.at[0]:
            padding = jnp.where(tokens.size > 0, 0, -jnp.inf).astype(tokens.size.dtype)[:, None, None, :]
            bias = padding if bias is None else padding + bias
        scores = significance(q, k, v, bias, scale)[:, self.prefix - 1 :] if block in self.at else None
        return attend(q, k, v, bias, scale), scores

    def reduce(self, tokens: Tokens, block: int, train: bool, seen: Any) -> Tokens:
        if block not in self.at:
            return tokens
        valid = tokens.size > 0
        patches = valid.shape[1] - self.prefix
        most = min(self.most[self.at.index(block)] or patches, patches)
        order, kept = sample(finite("scores", seen), self.steps, valid=valid[:, self.prefix :], most=most)
        order = behind(self.prefix, order)
        kept = jnp.pad(kept, ((0, 0), (self.prefix, 0)), constant_values=True)
        moves, kept = (
            lost(order[:, : self.prefix + most], order[:, self.prefix + most :]),
            kept[:, : self.prefix + most],
        )
        origin = follow(tokens.origin, moves)
        origin = jnp.where((origin >= 0) & rows(kept, jnp.maximum(origin, 0)), origin, -1)
        size = kept.astype(tokens.size.dtype)
        x = rows(tokens.x, moves.keep) * size.astype(tokens.x.dtype)[..., None]
        tokens = tokens._replace(x=x, origin=origin, size=size)
        return tokens.noted(block, order=order, size=size)

    def after(self, tokens: Tokens, block: int, train: bool) -> Tokens:
        return tokens._replace(x=tokens.x * tokens.size.astype(tokens.x.dtype)[..., None])


def reduction(at: tuple[int, ...] = tuple(range(3, 12)), most: int | tuple[int | None, ...] | None = None) -> ATS:
    """ATS's reduction, for the field `reduce` of a ViT with a class token; adds no parameters.

    The attention of the survivors is that of all their keys: a token is lost after the block's attention. Endpoints:
    `size` (B, M), 1 for tokens and 0 for padding, and of each block `block04_size` and `block04_order` (B, N),
    positions of the tokens of before, survivors first.

    Args:
      at: blocks that sample, counted from 0; the default is the published one for DeiT.
      most: patches that go on at most, for all these blocks or one each; None for as many as there are. Arrays have
        this length, so without it nothing is computed faster than in the whole network.
    Raises:
      ValueError: blocks that do not ascend, a `most` below 1 or of another length.
    """
    if not at or list(at) != sorted(set(at)) or at[0] < 0:
        raise ValueError(f"at={at}: name one block or more, in ascending order")
    limits = tuple(most) if isinstance(most, tuple | list) else (most,) * len(at)
    if len(limits) != len(at):
        raise ValueError(f"most={most}: give one number, or one for each of {len(at)} blocks")
    if any(limit is not None and limit < 1 for limit in limits):
        raise ValueError(f"most={most}: at least one patch has to be kept")
    return ATS(at=tuple(at), most=limits)
