"""Text targets: one sentence embedding for every training example, for GPT4Image's losses.

    python -m research.distill.text_targets --embeddings captions.npz --kind folder --path imagenet --out targets.npz

The embeddings come from any text encoder that the user runs (GPT4Image: CLIP's RN50 text tower on MiniGPT-4 captions),
in one of these files of NumPy:

  .npy                      (R, D), one row a training image in the order of the data, or one a class
  .npz, `embeddings`        the same
  .npz, and `keys`          (R,) text: names of classes, or paths of images as the data has them
  .npz of other arrays      each (D,) or (K, D), named by its key

Several rows of one key (several captions) become their mean direction. Every row is made a unit vector, which the
losses expect and do not do themselves.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from research.core.errors import UserError, cli
from research.data import sources
from research.data.base import Source

RANDOM = "random"  # in the place of a file: targets without meaning, to try the plumbing
_RANDOM_WIDTH = 16


class Targets(NamedTuple):
    """Embeddings (R, D) of unit rows, and the row (N,) int32 of every training example."""

    embeddings: np.ndarray
    rows: np.ndarray


def read(path: str) -> tuple[np.ndarray, list[str] | None]:
    """(embeddings (R, D), their keys or None) of a user's file; raises UserError where it is none of the forms."""
    try:
        found = np.load(path, allow_pickle=False)
        arrays = found if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not readable as .npy or .npz without pickled objects ({error})") from None
    if isinstance(arrays, np.ndarray):
        return arrays, None
    if "embeddings" in arrays:
        keys = arrays.get("keys")
        if keys is not None and keys.shape != arrays["embeddings"].shape[:1]:
            raise UserError(f"{path}: {keys.shape} keys for embeddings {arrays['embeddings'].shape}; give one a row")
        return arrays["embeddings"], None if keys is None else [str(key) for key in keys]
    rows = {key: np.atleast_2d(array) for key, array in arrays.items()}
    if len({array.shape[1:] for array in rows.values()}) != 1:
        raise UserError(f"{path}: its arrays differ in width; each key takes (D,) or (K, D)")
    return np.concatenate(list(rows.values())), [key for key, array in rows.items() for _ in array]


def align(embeddings: np.ndarray, keys: Sequence[str] | None, source: Source) -> Targets:
    """The targets of a source's examples.

    Args:
      embeddings: (R, D) of any float dtype, not necessarily unit vectors.
      keys: of the rows: class names, or image paths (with or without the split's folder); None where the rows are in
        the order of the source's examples, or of its classes.
    Raises:
      UserError: rows that are no vectors, or examples without a row; the text names the first.
    """
    vectors = _unit(embeddings)
    if keys is None:
        return Targets(vectors, _rows_by_count(len(vectors), source))
    keys, row_of = np.unique(np.asarray(keys), return_inverse=True)
    means = np.zeros((len(keys), vectors.shape[1]), vectors.dtype)
    np.add.at(means, row_of, vectors)
    row = {key: index for index, key in enumerate(keys.tolist())}
    by_class = bool(row.keys() & set(source.class_names))
    names = source.class_names if by_class else getattr(source, "paths", None)
    if names is None:
        raise UserError(f"text targets: {keys[0]!r} is no class of {source.name}, whose images have no paths")
    # A key may leave the folder of the split out: train/cat/1.jpg is found as cat/1.jpg too.
    found = [row.get(name, row.get(name.partition("/")[2], -1)) for name in names]
    if missing := [name for name, index in zip(names, found, strict=True) if index < 0]:
        some = f"the first is {missing[0]!r}, the first key {keys[0]!r}"
        raise UserError(f"text targets: {len(missing)} of {source.name} have no embedding; {some}")
    rows = np.asarray(found, np.int32)
    return Targets(_unit(means), rows[_labels(source)] if by_class else rows)


def _rows_by_count(count: int, source: Source) -> np.ndarray:
    if count == len(source):
        return np.arange(count, dtype=np.int32)
    if count == source.num_classes:
        return _labels(source)
    raise UserError(
        f"text targets: {count} embeddings for the {len(source)} examples and {source.num_classes} classes of "
        f"{source.name}: give one row for each, in its order, or keys"
    )


def _labels(source: Source) -> np.ndarray:
    if source.labels is None:
        raise UserError(f"text targets: {source.name} does not know its labels unread; give one embedding an example")
    return source.labels


def _unit(embeddings: np.ndarray) -> np.ndarray:
    if embeddings.ndim != 2 or embeddings.dtype.kind != "f":
        raise UserError(f"text targets: embeddings are {embeddings.dtype} {embeddings.shape}, not floating (R, D)")
    vectors = embeddings.astype(np.float32)
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length[:, 0]) & (length[:, 0] > 0)))
    if bad.size:
        raise UserError(f"text targets: {bad.size} rows have no direction (zero, or not finite); the first is {bad[0]}")
    return vectors / length


def save(path: str | pathlib.Path, targets: Targets) -> None:
    """Writes targets, the embeddings in float16 as GPT4Image stored them (1.28 million of 1024 take 2.6 GB)."""
    np.savez(path, embeddings=targets.embeddings.astype(np.float16), rows=targets.rows)


def load(path: str, num_examples: int) -> Targets:
    """Reads what `save` wrote, for a training set of `num_examples`; the path `random` makes targets up.

    Raises:
      UserError: no such file, another content, or targets of another number of examples.
    """
    if path == RANDOM:
        draw = np.random.default_rng(0).normal(size=(num_examples, _RANDOM_WIDTH))
        return Targets(_unit(draw), np.arange(num_examples, dtype=np.int32))
    try:
        with np.load(path, allow_pickle=False) as found:
            targets = Targets(found["embeddings"], found["rows"])
    except (OSError, ValueError, KeyError, EOFError, AttributeError) as error:
        made = "make them with python -m research.distill.text_targets"
        raise UserError(f"teacher.text: {path} holds no text targets ({error}); {made}") from None
    if targets.rows.shape != (num_examples,):
        raise UserError(f"teacher.text: {path} has targets of {len(targets.rows)} examples, the data {num_examples}")
    return targets


@cli
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="text_targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", required=True, metavar="FILE", help=".npy or .npz, see above")
    parser.add_argument("--out", required=True, metavar="FILE", help=".npz for teacher.text")
    parser.add_argument("--kind", default="folder", help="of the data, as data.kind")
    parser.add_argument("--path", default="", help="of the data, as data.path")
    parser.add_argument("--split", default="train", help="of the data, as data.split; empty where it has none")
    given = parser.parse_args(argv)
    source = sources.source(given.kind, given.path, split=given.split or None)
    targets = align(*read(given.embeddings), source)
    save(given.out, targets)
    distinct, width = targets.embeddings.shape
    print(f"{given.out}: {len(targets.rows)} examples of {source.name}, {distinct} embeddings of width {width}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
