"""PPT's threshold for a network and images of one's own: what prunes a wanted share of the images.

The variance of scores depends on the network, the number of tokens and the images; the published thresholds are those
of DeiT-S on ImageNet with r=50. Blocks are decided one after another, as what a block prunes and pools is what the next
ones see. The command is `launch.calibrate`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from research.backbones import classify
from research.tokens.ppt import PPT


def threshold(variances: np.ndarray, share: float) -> float:
    """The threshold that prunes `share` of the images with these variances (n,): `variance >= threshold` prunes.

    It lies between the two variances it parts, so that rounding does not turn one over. Of variances that are equal
    where they would have to be parted, all are pooled.

    Raises:
      ValueError: a share outside [0, 1], no variances, some that are not finite.
    """
    ordered = np.sort(np.asarray(variances).ravel())
    if not 0 <= share <= 1:
        raise ValueError(f"share: {share} is not in [0, 1]")
    if not len(ordered) or not np.all(np.isfinite(ordered)):
        raise ValueError(f"variances: {len(ordered)}, of which {np.sum(np.isfinite(ordered))} are finite numbers")
    pooled = len(ordered) - round(share * len(ordered))
    if pooled == 0:
        return 0.0
    # Equal ones are pooled together; beyond the largest there is one that no image reaches.
    above = ordered[ordered > ordered[pooled - 1]]
    low = ordered[pooled - 1]
    high = above[0] if len(above) else low * 2 + np.finfo(ordered.dtype).tiny
    middle = low + (high - low) / 2
    return float(middle if middle > low else high)


def calibrated(
    reduction: PPT, variances: Callable[[PPT, int], np.ndarray], share: float | Sequence[float] = 0.5
) -> PPT:
    """The reduction with a threshold for each of its blocks, which prunes `share` of the images in every one of them.

    Args:
      reduction: `ppt.reduction(...)`; under the policy `reverse`, `share` is what is pooled.
      variances: (reduction, block) -> variances of the scores of every image in that block, see `measured`.
      share: one, or one for each block.
    Raises:
      ValueError: see `threshold`; a wrong number of shares.
    """
    shares = tuple(share) if isinstance(share, Sequence) else (share,) * len(reduction.blocks)
    if len(shares) != len(reduction.blocks):
        raise ValueError(f"share has {len(shares)} entries for {len(reduction.blocks)} blocks")
    found = [0.0] * len(reduction.blocks)
    for at, wanted in enumerate(shares):
        known = dataclasses.replace(reduction, threshold=tuple(found))
        found[at] = threshold(variances(known, reduction.blocks[at]), wanted)
    return dataclasses.replace(reduction, threshold=tuple(found))


def measured(
    network: classify.Network, params, model_state, batches: Callable[[], Iterable]
) -> Callable[[PPT, int], np.ndarray]:
    """(reduction, block) -> variances (n,) of the scores of all images, by one pass over them.

    Args:
      network: a ViT with any `reduce` or none, which the one asked about replaces.
      batches: gives images in [0, 1], (B, H, W, 3), from the first on; a last batch that is smaller compiles again.
    """

    def variances(reduction: PPT, block: int) -> np.ndarray:
        reduced = network._replace(module=network.module.clone(reduce=reduction))
        name = f"block{block + 1:02d}_variance"
        apply = jax.jit(lambda images: reduced.apply(params, model_state, images)[1][name])
        return np.concatenate([np.asarray(apply(images)) for images in batches()])

    return variances
