"""ReLabel: label maps of whole images, pooled over the box of a crop (Yun et al., arXiv 2101.05022, LabelPooling).

A label map holds the k largest scores of a classifier at h x w places of the image, zeros for all other classes. A
crop's label is the softmax of the map's RoI-aligned mean over its box, as in naver-ai/relabel_imagenet: one bin, one
sample for each cell that the box spans, coordinates without the half-pixel shift of `aligned=True` but with 0.5
subtracted before. There, rows of the box are multiplied with the columns of the stored map; here rows are rows. A flip
changes nothing in a mean over the box, and other augmentation leaves the label alone, as in the published runs.
"""

import math
from typing import NamedTuple

import numpy as np

from research.data import transforms


class Box(NamedTuple):
    """A part of an image in shares of its height and width; beyond 0..1 where a crop reaches into padding."""

    top: float
    left: float
    bottom: float
    right: float


def crop_box(transform: transforms.Train, height: int, width: int, rng) -> Box:
    """The box that `transform` cuts from an image of height x width pixels when it draws from `rng`.

    `rng` gives the draws of the transform from their begin, e.g. a tape.Player.
    """
    if transform.crop == "resized":
        top, left, h, w = transforms.resized_crop_box(rng, height, width, transform.scale, transform.ratio)
        return Box(top / height, left / width, (top + h) / height, (left + w) / width)
    if transform.crop == "none":
        return Box(0.0, 0.0, 1.0, 1.0)
    rng.integers(len(transforms.augment.INTERPOLATIONS[transform.interpolation]))
    top, left = ((int(edge) - transform.pad) / transform.size for edge in rng.integers(0, 2 * transform.pad + 1, 2))
    return Box(top, left, top + 1, left + 1)


def sample_weights(low: float, high: float, cells: int) -> np.ndarray:
    """The weight (cells,) of each cell in the mean of one RoI-align bin that spans low..high, in cells.

    As torchvision.ops.roi_align with output size 1, aligned=False and sampling_ratio=-1: the span is at least one cell
    and has ceil(span) bilinear samples; those more than one cell outside are zero, others are clamped.
    """
    span = max(high - low, 1.0)
    count = math.ceil(span)
    places = low + (np.arange(count) + 0.5) * span / count
    inside = (places >= -1) & (places <= cells)
    places = np.clip(places, 0, cells - 1)
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, cells - 1)
    weights = np.zeros(cells)
    np.add.at(weights, below, inside * (1 - (places - below)))
    np.add.at(weights, above, inside * (places - below))
    return weights / count


def pool(scores: np.ndarray, classes: np.ndarray, box: Box, num_classes: int) -> np.ndarray:
    """The log-probabilities (num_classes,) float32 of a box: log softmax of the pooled map.

    Args:
      scores, classes: (h, w, k) of a label map.
      box: part of the image.
      num_classes: C.
    """
    height, width, _ = scores.shape
    rows = sample_weights(box.top * height - 0.5, box.bottom * height - 0.5, height)
    columns = sample_weights(box.left * width - 0.5, box.right * width - 0.5, width)
    weights = rows[:, None, None] * columns[None, :, None] * scores.astype(np.float64)
    logits = np.bincount(classes.ravel(), weights.ravel(), num_classes)
    logits -= logits.max()
    return (logits - np.log(np.sum(np.exp(logits)))).astype(np.float32)
