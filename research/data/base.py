"""What every source of images is, and the errors they share."""

import difflib
import pathlib
from collections.abc import Sequence

import numpy as np

from research.core import storage
from research.core.errors import UserError


class BadExample(ValueError):
    """One example that cannot be read or decoded; the pipeline adds its name and applies `data.on_corrupt`."""


class Source:
    """A random-access collection of labelled images: example i is the same in every process and after every restart.

    A source gives `image(index)`, encoded bytes or a uint8 (H, W, 1 or 3) array, which raises BadExample where it
    cannot be read; or, where image and label are read together, a `__getitem__` of its own.

    Attributes:
      name: what messages call it.
      class_names: the classes in the order of their labels.
      labels: (len,) int32 array where labels are known without reading the examples, else None.
      concurrency: reads a core should keep under way; more than 1 where a read waits for a network.
    """

    concurrency = 1

    def __init__(self, name: str, class_names: Sequence[str], labels: Sequence[int] | np.ndarray | None = None):
        self.name = name
        self.class_names = tuple(class_names)
        self.labels = None if labels is None else np.asarray(labels, np.int32)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        """`{'image': bytes or uint8 (H, W, C), 'label': int, 'index': int}`; raises IndexError, BadExample."""
        self._inside(index)
        return {"image": self.image(index), "label": int(self.labels[index]), "index": int(index)}

    def _inside(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, no number {index}")

    def transform(self, train: bool):
        """`(example, rng) -> row of a batch`, where the kind of data settles it; None for images: the config does."""
        del train

    def leave(self, folder: storage.Path) -> None:
        """Writes into a run's folder what who uses the trained model has to know of the data; nothing of images."""
        del folder

    def where(self, index: int) -> str:
        """Names example `index` for a person: a file, an archive's entry, or a number."""
        return f"{self.name}[{index}]"


def existing(path: str | pathlib.Path) -> pathlib.Path:
    """The path, or a FileNotFoundError that names its config key."""
    found = pathlib.Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"data.path: nothing at {path}; set data.path to the dataset's folder or file")
    return found


def choose_split(split: str | None, splits: Sequence[str], where: str) -> str:
    """`split` if the data has it, else an error naming those it has."""
    if split in splits:
        return split
    said = f"no {split!r}" if split else "not set"
    has = ", ".join(map(repr, splits))
    raise UserError(f"data.split or eval.split: {said}; {where} has {has}{nearest(split, splits)}")


def nearest(wrong: str | None, names: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing where no name is near."""
    near = difflib.get_close_matches(wrong or "", list(names), 1)
    return f"; did you mean {near[0]}?" if near else ""
