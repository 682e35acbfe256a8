"""Opens sources of labelled images, and of text: `source(kind, path, split)`.

Opening reads names and labels only, and images one by one. Order, repetition and sharding belong to
research.data.pipeline, decoding and augmentation to research.data.transforms.
"""

import functools
import inspect
import pathlib
from collections.abc import Sequence

import numpy as np

from research.core.errors import UserError
from research.data import files
from research.data.base import Source, choose_split, existing, nearest
from research.data.fractals import Fractals
from research.data.shards import METADATA, open_shards
from research.data.text import Text


class Arrays(Source):
    """Images and labels in memory.

    Args:
      images: (N, H, W) or (N, H, W, 1 or 3) uint8.
      labels: (N,) integers from 0.
      class_names: names of the classes; their numbers by default.
      num_classes: at least the largest label + 1, which it is by default.
    """

    def __init__(self, images, labels, class_names: Sequence[str] | None = None, num_classes=None, name="arrays"):
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (1,), (3,)):
            raise UserError(
                f"data: {name}: images are {images.dtype} {images.shape}; give uint8 (N, H, W) or (N, H, W, 1 or 3)"
            )
        if labels.dtype.kind not in "iu" or labels.size != len(images):
            raise UserError(
                f"data: {name}: {len(images)} images need as many whole labels, got {labels.dtype} {labels.shape}"
            )
        labels = labels.reshape(-1)
        low, seen = (int(labels.min()), int(labels.max()) + 1) if labels.size else (0, 0)
        names = tuple(map(str, range(max(seen, num_classes or 0)) if class_names is None else class_names))
        if low < 0 or seen > len(names):
            raise UserError(f"data: {name}: labels {low} to {seen - 1} do not fit {len(names)} classes numbered from 0")
        super().__init__(name, names, labels)
        self.images = images if images.ndim == 4 else images[..., None]

    def image(self, index: int) -> np.ndarray:
        return self.images[index]


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.rint(data.images * (255 / 16)).astype(np.uint8), data.target.astype(np.int32)


def digits(split: str = "train") -> Source:
    """scikit-learn's 1,797 handwritten digits (8x8; UCI optical recognition test set), carried by the library itself.

    Of every class each fifth example is in `test`, the others in `train` (1,442 and 355); `all` has both.
    """
    images, labels = _digits()
    rank = np.zeros(len(labels), np.int32)
    for label in range(10):
        rank[labels == label] = np.arange(np.sum(labels == label))
    parts = {"train": rank % 5 != 4, "test": rank % 5 == 4, "all": rank >= 0}
    keep = parts[choose_split(split, list(parts), "digits")]
    return Arrays(np.repeat(images[keep][..., None], 3, axis=-1), labels[keep], num_classes=10, name=f"digits {split}")


def arrays(
    path: str | None = None, split: str | None = None, num_classes: int | None = None, images=None, labels=None
) -> Source:
    """Arrays given as `images` and `labels`, or those of a NumPy archive.

    The archive holds `image` and `label` (or `images`, `labels`), with `<split>_` before them where it has splits, and
    optionally `class_names`. Raises UserError where the arrays are missing or hold Python objects.
    """
    if images is not None:
        return Arrays(images, labels, num_classes=num_classes)
    if not path:
        raise UserError("data.path: a source of kind 'arrays' needs an .npz file there (or images and labels)")
    try:
        with np.load(existing(path), allow_pickle=False) as file:
            found = {key: file[key] for key in _members(path, file.files, split)}
    except (ValueError, OSError, EOFError, AttributeError) as error:
        if isinstance(error, (UserError, FileNotFoundError)):
            raise
        raise UserError(f"data.path: {path} is not a readable .npz of plain arrays ({error})") from None
    names = found.pop("class_names", None)
    return Arrays(*found.values(), None if names is None else names.tolist(), num_classes, name=str(path))


def _members(path: str, keys: list[str], split: str | None) -> list[str]:
    """The archive's keys of images and labels of the split, and of class names if there."""
    bare = {key.removesuffix("s"): key for key in keys if key != "class_names"}
    splits = sorted(name.removesuffix("_image") for name in bare if name.endswith("_image"))
    prefix = f"{choose_split(split, splits, str(path))}_" if splits else ""
    for name in ("image", "label"):
        if prefix + name not in bare:
            raise UserError(f"data.path: {path} has no array {prefix + name!r}; it holds {', '.join(keys) or 'none'}")
    return [bare[prefix + "image"], bare[prefix + "label"], *(["class_names"] if "class_names" in keys else [])]


class Tfds(Source):
    """An image classification dataset of TensorFlow Datasets in a random-access format, read without TensorFlow.

    Prepare it once: `tfds.builder(name, file_format='array_record', data_dir=path).download_and_prepare()`.

    Args:
      tfds_name: the dataset's name, with `/config:version` if wanted; empty where `path` is a prepared dataset's own
        folder (the one with dataset_info.json).
      path: the data_dir, or that folder.
      split: one of the dataset's splits.
    """

    def __init__(self, tfds_name: str = "", path: str | None = None, split: str | None = None):
        import tensorflow_datasets as tfds

        if not tfds_name and not path:
            raise UserError("data.options.tfds_name: a source of kind 'tfds' needs one, e.g. cifar10, or data.path")
        if path:
            existing(path)
        try:
            builder = tfds.builder(tfds_name, data_dir=path) if tfds_name else tfds.builder_from_directory(path)
            title = tfds_name or f"{path} ({builder.name})"
            splits = list(builder.info.splits or ())
            if not splits:
                raise UserError(
                    f"data.path: {title} is not prepared in {builder.data_dir}; see tfds' download_and_prepare"
                )
            split = choose_split(split, splits, title)
            features = builder.info.features
            if not {"image", "label"} <= set(features):
                raise UserError(f"data: {title} has features {', '.join(features)}; it needs image and label")
            self._data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        except UserError:
            raise
        except (tfds.core.DatasetNotFoundError, ValueError, NotImplementedError, OSError) as error:
            line = str(error).strip().split("\n")[0]
            raise UserError(
                f"data.options.tfds_name: TensorFlow Datasets cannot open {tfds_name or path} ({line})"
            ) from None
        super().__init__(f"{title} {split}", features["label"].names)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        self._inside(index)
        example = self._data[index]
        return {"image": example["image"], "label": int(example["label"]), "index": int(index)}


def _folder(path: str | None = None, split: str | None = None) -> Source:
    return files.folder(_needed(path, "folder"), split)


def _zip(path: str | None = None, split: str | None = None) -> Source:
    return files.archive(_needed(path, "zip"), split)


def _needed(path: str | None, kind: str) -> pathlib.Path:
    if not path:
        raise UserError(f"data.path: a source of kind {kind!r} needs one, set data.path=<where the images are>")
    return existing(path)


KINDS = {
    "digits": digits,
    "folder": _folder,
    "zip": _zip,
    "tfds": Tfds,
    "arrays": arrays,
    "arrayrecord": open_shards,
    "fractals": Fractals,
    "text": Text,
}


def splits(kind: str | None = None, path: str | None = None) -> list[str]:
    """The names of a source's splits as far as they can be told without opening it; [] where it has none."""
    kind = kind or _kind_of(path)
    if kind == "digits":
        return ["train", "test"]
    if kind in ("folder", "zip"):
        return (files.folder_splits if kind == "folder" else files.archive_splits)(_needed(path, kind))
    if kind == "tfds" and path:
        import tensorflow_datasets as tfds

        return list(tfds.builder_from_directory(path).info.splits)
    return []


def source(
    kind: str | None = None,
    path: str | None = None,
    split: str | None = None,
    num_classes: int | None = None,
    **options,
) -> Source:
    """Opens a source of labelled images, or of text.

    Args:
      kind: `digits`, `folder`, `zip`, `tfds`, `arrays`, `arrayrecord`, `fractals` or `text`; None tells folders,
        shards, .zip and .npz files of images apart.
      path: the folder, .zip or .npz file, the data_dir of TensorFlow Datasets, or the folder or `gs://` address of
        shards.
      split: the part to read, where the data has parts; `train`, `test` and `all` of digits; `test` of fractals.
      num_classes: the number of classes expected (0 or None: whatever the data has); for fractals, the number made.
      **options: `tfds_name` (tfds), `images` and `labels` (arrays), `cache` and `cache_gb` (arrayrecord), `size`,
        `instances`, `seed`, `color` (fractals), `files`, `tokenizer`, `vocab`, `context` (text).
    Raises:
      FileNotFoundError: nothing at `path`.
      UserError: unknown kind, option or split, an empty or unreadable dataset, or another number of classes.
    """
    kind = kind or _kind_of(path)
    if kind not in KINDS:
        raise UserError(f"data.kind: no kind {kind!r}; it is one of {', '.join(KINDS)}{nearest(kind, list(KINDS))}")
    takes = inspect.signature(KINDS[kind]).parameters
    for option in options:
        if option not in takes:
            own = ", ".join(name for name in takes if name not in ("path", "split", "num_classes"))
            raise UserError(f"data.options.{option}: not an option of kind {kind!r}, which takes {own or 'none'}")
    if path and "path" not in takes:
        raise UserError(
            f"data.path: {path} given, but kind {kind!r} reads no file: set data.kind to folder, zip or arrayrecord"
        )
    common = {"path": path, "split": split, "num_classes": num_classes}
    opened = KINDS[kind](**{key: value for key, value in common.items() if key in takes and value}, **options)
    if len(opened) == 0:
        raise UserError(f"data.path: {opened.name} holds no examples; point data.path at a folder or file with images")
    if num_classes and num_classes != opened.num_classes:
        names = ", ".join(opened.class_names[:3])
        raise UserError(
            f"data.num_classes: {num_classes} given, but {opened.name} has {opened.num_classes} ({names}, ...): "
            f"set data.num_classes={opened.num_classes}, or another data.path"
        )
    return opened


def _kind_of(path: str | None) -> str:
    if not path:
        raise UserError(f"data.kind: set one of {', '.join(KINDS)}, or data.path to a folder, .zip or .npz of images")
    if "://" in path:
        return "arrayrecord"
    found = existing(path)
    if found.is_dir():
        return "arrayrecord" if (found / METADATA).exists() else "folder"
    kind = {".zip": "zip", ".npz": "arrays"}.get(found.suffix.lower())
    if kind is None:
        raise UserError(f"data.path: {path} is neither a folder nor a .zip or .npz; set data.kind to say what it is")
    return kind
