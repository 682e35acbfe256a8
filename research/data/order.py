"""Which example stands where in a run: permutations, epochs and repeated augmentation as arithmetic on step numbers."""

import dataclasses
import functools
from collections.abc import Sized

import grain.python as grain
import numpy as np

SMALL = 1 << 16  # permutations up to this length are written out, below it Grain's shuffle takes long walks


def steps_per_epoch(source: Sized, batch_size: int, repeats: int = 1) -> int:
    """Steps of one epoch: whole batches in the data, at least one.

    With repeated augmentation as many, counted as timm's sampler does: the data's length is first rounded down to 256s,
    and an epoch's steps hold only 1/`repeats` of the images, each that often.
    """
    length = len(source)
    return max(1, (length // 256 * 256 if repeats > 1 and length >= 256 else length) // batch_size)


@dataclasses.dataclass(frozen=True)
class Order:
    """The index of the example at (step, row) of a run.

    An epoch is `steps` steps over a new permutation; a remainder smaller than a batch is left out, as a PyTorch loader
    with drop_last does. A data set smaller than a batch is gone through several times a step.

    With `repeats`, each entry of the permutation stands that often in a row, and the rows are dealt like cards over the
    batch's groups of `group` consecutive ones: copies of an image come to different groups, as timm deals them to
    different GPUs. Without `group` they stay neighbours.
    """

    length: int
    batch_size: int
    seed: int
    steps: int
    repeats: int = 1
    group: int | None = None

    @functools.cached_property
    def _endless(self) -> grain.MapDataset:
        """Element e * length + i is entry i of permutation e, computed in constant memory."""
        return grain.MapDataset.range(self.length).seed(self.seed).shuffle()

    def __call__(self, step: int, row: int) -> int:
        epoch, step = divmod(step, self.steps)
        if self.repeats > 1 and self.group:
            row = row % self.group * (self.batch_size // self.group) + row // self.group
        entry = (step * self.batch_size + row) // self.repeats
        entries = -(-self.steps * self.batch_size // self.repeats)
        laps = -(-entries // self.length)  # permutations an epoch uses: one, unless the data are fewer than a batch
        number, entry = epoch * laps + entry // self.length, entry % self.length
        if self.length <= SMALL:
            return int(_permutation(self.seed, number, self.length)[entry])
        return int(self._endless[number * self.length + entry])


@functools.lru_cache(maxsize=16)
def _permutation(seed: int, number: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(length)
