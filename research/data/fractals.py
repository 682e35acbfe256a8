"""Procedural fractals: labelled images without data, for pre-training.

Every class is an iterated function system (IFS); its images are renderings with jittered parameters, flips, and other
point patterns, as in Kataoka et al., "Pre-training without Natural Images" (FractalDB, ACCV 2020, arXiv 2101.08515).
The maps are drawn through their singular values, which makes each a contraction and no draw divergent: Anderson and
Farrell, "Improving Fractal Pre-training" (WACV 2022, arXiv 2110.03091), section 3.1.
"""

import functools

import numpy as np

from research.core.errors import UserError
from research.data.base import Source, choose_split

POINTS = 100_000  # rendered points an image, as FractalDB
SPLITS = ("train", "test")
_CHAINS = 500  # points that wander side by side: the chaos game as array operations
_BURN_IN = 20  # steps until a chain is on the attractor
_FILLED = 0.2  # least share of pixels a class fills at 32x32, FractalDB's test for a shape worth learning


class Fractals(Source):
    """Renderings of random iterated function systems; label = number of the system.

    Args:
      size: side of the square images in pixels.
      num_classes: how many systems.
      instances: images a class. None makes the source endless: 2^31 - 1 images, every one different.
      seed: another seed gives other systems.
      color: a colour for every image instead of white, still on black.
      split: `test` gives other images of the same systems than `train`, the default.
    """

    def __init__(
        self,
        size: int = 224,
        num_classes: int = 1000,
        instances: int | None = 1000,
        seed: int = 0,
        color: bool = False,
        split: str = "train",
    ):
        if min(size, num_classes) < 1 or (instances is not None and instances < 1):
            raise UserError(f"data: fractals of {size=}, {num_classes=}, {instances=}: each has to be at least 1")
        super().__init__(f"fractals of {num_classes} systems", [f"ifs{i:04d}" for i in range(num_classes)])
        self.size, self.seed, self.color = size, seed, color
        self.part = 1 + SPLITS.index(choose_split(split, SPLITS, self.name))
        self.length = 2**31 - 1 if instances is None else num_classes * instances

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        self._inside(index)
        return {"image": self.image(index), "label": index % self.num_classes, "index": int(index)}

    def image(self, index: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, self.part, index))
        maps, weights = system(self.seed, index % self.num_classes)
        # FractalDB: each of the parameters scaled by 0.8 to 1.2. Scaling the six together keeps the shape recognisable.
        scale = rng.uniform(0.8, 1.2, len(maps))
        stretch = np.linalg.norm(maps[:, :, :2], ord=2, axis=(1, 2))
        maps = maps * np.minimum(scale, 0.98 / stretch)[:, None, None]
        canvas = draw(maps, weights, self.size, rng)
        canvas = canvas[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
        tint = rng.uniform(0.3, 1.0, 3) if self.color else np.ones(3)
        return (canvas[..., None] * (255 * tint)).astype(np.uint8)


@functools.lru_cache(maxsize=4096)
def system(seed: int, label: int) -> tuple[np.ndarray, np.ndarray]:
    """The maps (k, 2, 3) of one class, and how often each is taken (k,), proportional to its determinant.

    k is 2 to 8. Systems that fill less than a fifth of a coarse canvas are drawn again; the tenth draw is kept.
    """
    rng = np.random.default_rng((seed, 0, label))
    for _ in range(10):
        count = int(rng.integers(2, 9))
        maps = np.stack([_contraction(rng, s) for s in _singular_values(rng, count)])
        size = np.abs(np.linalg.det(maps[:, :, :2])) + 1e-3
        weights = size / size.sum()
        if draw(maps, weights, 32, rng, points=5_000).mean() > _FILLED:
            break
    return maps, weights


def _singular_values(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) singular values below 1 whose weighted sum s1 + 2 s2 lies where attractors look well (alpha there)."""
    total = rng.uniform(0.5 * (5 + count), 0.5 * (6 + count))
    values = rng.uniform(0.0, 1.0, (count, 2))
    values.sort(axis=1)
    values = values[:, ::-1]
    weight = values @ np.array([1.0, 2.0])
    return np.minimum(values * (total / weight.sum()), 0.95)


def _contraction(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """A random affine map (2, 3) with the given singular values."""

    def turn(angle: float) -> np.ndarray:
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    before, after = rng.uniform(0, 2 * np.pi, 2)
    flip = np.diag(rng.choice([-1.0, 1.0], 2))
    return np.hstack([turn(before) @ np.diag(values) @ turn(after) @ flip, rng.uniform(-1, 1, (2, 1))])


def draw(maps: np.ndarray, weights: np.ndarray, size: int, rng: np.random.Generator, points=POINTS) -> np.ndarray:
    """Plays the chaos game; returns a (size, size) float canvas of zeros and ones.

    The attractor is scaled to the canvas. Points far out (beyond the 0.5 % quantiles) are clipped to its edge, so that
    a few do not shrink the rest.
    """
    steps = -(-points // _CHAINS) + _BURN_IN
    choices = rng.choice(len(maps), (steps, _CHAINS), p=weights)
    place, seen = np.zeros((_CHAINS, 2)), np.empty((steps, _CHAINS, 2))
    linear, offset = maps[:, :, :2], maps[:, :, 2]
    for step, choice in enumerate(choices):
        place = np.einsum("nij,nj->ni", linear[choice], place) + offset[choice]
        seen[step] = place
    cloud = seen[_BURN_IN:].reshape(-1, 2)
    low, high = np.quantile(cloud, [0.005, 0.995], axis=0)
    cells = (cloud - low) / np.maximum(high - low, 1e-9) * (size - 1)
    cells = np.clip(np.rint(cells), 0, size - 1).astype(np.intp)
    canvas = np.zeros((size, size), np.float64)
    canvas[cells[:, 1], cells[:, 0]] = 1.0
    return canvas
