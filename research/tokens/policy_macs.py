"""Multiply-adds of one image as the papers' tables have them, in closed form: DynamicViT, Evo-ViT, LV-ViT.

The tables come from torchprofile, which counts products and convolutions, and beside them one an entry of each norm,
of a mean, and of a product of two arrays that is no matrix product; `research.core.cost.macs` counts products alone.
"""

import itertools
from collections.abc import Sequence

from research.layers.patch_embed import grid


def block(entering: int, leaving: int, dim: int, heads: int, mlp_ratio: float = 4.0, scaled: str = "scores") -> int:
    """A transformer block of `entering` tokens in the attention and `leaving` ones in the MLP.

    `scaled` says what the attention scale multiplies: the `scores` of all heads (DeiT) or the `queries` (LV-ViT).
    """
    scale = heads * entering**2 if scaled == "scores" else entering * dim
    attention = 4 * entering * dim**2 + 2 * entering**2 * dim + scale
    return attention + 2 * leaving * dim * int(mlp_ratio * dim) + (entering + leaving) * dim


def predictor(patches: int, dim: int) -> int:
    """One predictor of DynamicViT: its norm, the products with the policy, and its layers."""
    half, quarter = dim // 2, dim // 4
    return patches * (dim + dim * dim + half + dim * half + half * quarter + quarter * 2)


def dynamicvit(
    dim: int,
    heads: int,
    at: Sequence[int] = (3, 6, 9),
    keep: Sequence[float] = (0.7, 0.7**2, 0.7**3),
    *,
    depth: int = 12,
    img_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 1000,
) -> int:
    """DynamicViT in evaluation, with tokens taken out of the arrays.

    It includes four products of integers a stage, two of them not in the last, by which the official code finds rows.
    """
    rows, columns = grid(img_size, patch_size)
    first = patches = rows * columns
    total = first * 3 * patch_size**2 * dim + dim * num_classes + 4 * len(at) - 2
    for index in range(depth):
        if index in at:
            total += predictor(patches, dim)
            patches = int(first * keep[list(at).index(index)])
        total += block(patches + 1, patches + 1, dim, heads)
    return total + (patches + 1) * dim


def evo_vit(
    dim: int,
    heads: int,
    stages: Sequence[tuple[int, int | None]] = ((4, 8), (8, 12)),
    keep: Sequence[float] = (0.5, 0.5),
    *,
    depth: int = 12,
    img_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 1000,
) -> int:
    """Evo-ViT in evaluation: no second classifier, one norm of the mean patch.

    The running mean of the attention counts its two products in every block from the second to the last selection;
    finding the rows of a selection takes two products of integers.
    """
    rows, columns = grid(img_size, patch_size)
    first = rows * columns
    total = first * 3 * patch_size**2 * dim + dim * num_classes + 2 * dim + 2 * len(stages)
    for index in range(depth):
        rates = [rate for (start, end), rate in zip(stages, keep, strict=True) if start <= index < (end or depth)]
        patches = int(first * rates[0]) if rates else first
        total += block(patches + 1, patches + 1, dim, heads)
        total += 2 * patches if 0 < index < stages[-1][0] else 0
    return total


def lvvit(
    dim: int,
    heads: int,
    depth: int,
    *,
    stem_width: int = 64,
    mlp_ratio: float = 3.0,
    img_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 1000,
) -> int:
    """LV-ViT with the classifier of its patches."""
    positions, (rows, columns) = (img_size // 2) ** 2, grid(img_size, patch_size)
    patches = rows * columns
    channels = (3, stem_width, stem_width, stem_width)
    kernels = (7, 3, 3)
    convolutions = (k * k * a * b for k, (a, b) in zip(kernels, itertools.pairwise(channels), strict=True))
    total = positions * (sum(convolutions) + 3 * stem_width)
    total += patches * stem_width * (patch_size // 2) ** 2 * dim
    total += depth * block(patches + 1, patches + 1, dim, heads, mlp_ratio, "queries")
    return total + (patches + 1) * dim * (1 + num_classes)
