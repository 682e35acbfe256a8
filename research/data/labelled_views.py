"""Training transforms that bring a teacher's stored labels with the image: `transform(example, rng)` for the pipeline.

Which of an example's views is used is drawn from `rng`, evenly and anew each time, as in apple/ml-dr and FKD. Taking
turns would show every view once before one is seen twice, but needs the number of the epoch, which a transform does
not know, and the copies of an image under repeated augmentation would have to know of each other. A drawn view depends
on (seed, position) alone, like everything else in a batch.

Beside 'image', 'label' and 'index' a result has 'partner' (int32 label of the image mixed in; the own one where there
is none), 'lam' (float32 share of the own label), and the teacher's 'known_logp' (k,) float32 log-probabilities,
'known_lse' () float32 log-sum-exp of its logits (0 for maps, whose scale is lost), and, where not all classes are kept,
'known_classes' (k,) int32.
"""

import dataclasses
import json
import logging
import zlib

import numpy as np

from research.core.errors import UserError
from research.data import label_files, label_maps, tape, transforms, views
from research.data.base import BadExample, Source

LOG = logging.getLogger(__name__)
SAMPLES = 3  # views that are compared with the teacher's when labels are opened


def identity(source: Source) -> dict:
    """What is kept of a data set to know it again: examples, classes, a digest of class names and labels.

    Where the data lie, and in which format, is no part of it.
    """
    labels = b"" if source.labels is None else np.asarray(source.labels, "<i4").tobytes()
    digest = zlib.crc32(labels, zlib.crc32("\n".join(source.class_names).encode()))
    return {"examples": len(source), "num_classes": source.num_classes, "digest": digest}


def options(part: transforms.Train | views.Mixing) -> dict:
    """The attributes of a transform or mixing as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(part)))


def check(made: dict, path: str, source: Source, transform: transforms.Train, mixing: views.Mixing) -> None:
    """Raises UserError where labels so made are of other data or other views; the message names the key."""
    again = f"run launch.labels again to label it in a new folder, or set teacher.labels to other labels than {path}"
    now = identity(source)
    for key, what in (("num_classes", "classes"), ("examples", "examples")):
        if made["data"][key] != now[key]:
            raise UserError(
                f"data.path: {source.name} has {now[key]} {what}, {path} is of {made['data'][key]}: {again}"
            )
    if made["data"]["digest"] != now["digest"]:
        raise UserError(f"data.path: {source.name} has other labels or class names than {path} is of: {again}")
    if made["form"] == label_files.MAPS:
        return  # a map is of the whole image: any crop and any mixing fits it
    for group, part in (("augment", transform), ("mix", mixing)):
        for key, value in options(part).items():
            if made[group].get(key) != value:
                was = made[group].get(key)
                raise UserError(f"{group}.{key}: {value}, but {path} was made with {was}: set it so, or {again}")


def fields(path: str) -> dict[str, tuple[type, tuple[int, ...]]]:
    """{name: (dtype, shape of one example)} of what labels in `path` add to a batch."""
    made = label_files.Labels(path).made
    classes = made["data"]["num_classes"]
    kept = classes if made["form"] == label_files.MAPS else made["top"]
    found = {"partner": (np.int32, ()), "lam": (np.float32, ()), "known_lse": (np.float32, ())}
    found["known_logp"] = (np.float32, (kept,))
    return found | ({"known_classes": (np.int32, (kept,))} if kept < classes else {})


def transform_of(path: str, source: Source, transform: transforms.Train, mixing: views.Mixing):
    """The training transform that replays the stored views in `path`, or pools its label maps for new ones.

    A few views are made again and compared with those that the teacher saw; a warning tells of other pixels.

    Raises:
      FileNotFoundError, UserError: no labels, damaged ones, or those of other data, augmentation or mixing.
    """
    labels = label_files.Labels(path)
    check(labels.made, path, source, transform, mixing)
    if labels.made["form"] == label_files.MAPS:
        return PooledViews(source, _Pooled(transform, labels), mixing)
    found = StoredViews(views.Views(source, transform, mixing), labels)
    for index in np.linspace(0, len(source) - 1, SAMPLES, dtype=int).tolist():
        if not found.exact(index):
            LOG.warning(
                f"teacher.labels: example {index} is not the image that the teacher saw when {path} was made, pixel "
                "for pixel: another version of Pillow, OpenCV or NumPy rounds otherwise, or the images are others"
            )
            break
    return found


@dataclasses.dataclass(frozen=True)
class StoredViews:
    """The transform of labels of crops: one of the example's views, made again, with its labels."""

    views: views.Views
    labels: label_files.Labels

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """The view and its labels; raises BadExample where the image could or can not be decoded."""
        record = self.labels[example["index"]]
        if not record.views:
            raise BadExample("it could not be read when it was labelled")
        number = int(rng.integers(len(record.views)))
        return self._replay(example, record, number)[0] | known(record.labels[number])

    def _replay(self, example: dict, record: label_files.Record, number: int) -> tuple[dict, views.View]:
        try:
            view = views.unpack(record.views[number])
            return self.views.replay(example, view), view
        except tape.Mismatch as error:
            raise UserError(
                f"teacher.labels: view {number} of {self.views.source.where(record.index)} cannot be made again "
                f"({error}): the image is another one than was labelled, or the code of the transform has changed"
            ) from None

    def exact(self, index: int) -> bool:
        """Whether the first view of example `index` has the pixels that were labelled; True where it has none."""
        record = self.labels[index]
        try:
            return not record.views or views.matches(*self._replay(self.views.source[index], record, 0))
        except BadExample:
            return True


def known(labels: np.void) -> dict:
    """The arrays of one view's stored labels, by their names in a batch."""
    found = {"known_logp": labels["logp"].astype(np.float32), "known_lse": np.float32(labels["lse"])}
    if "classes" in labels.dtype.names:
        found["known_classes"] = labels["classes"].astype(np.int32)
    return found


@dataclasses.dataclass(frozen=True)
class _Pooled:
    """`transform` with the label of its crop, pooled from the label map of the example."""

    transform: transforms.Train
    labels: label_files.Labels

    @property
    def size(self) -> int:
        return self.transform.size

    def __call__(self, example: dict, rng: tape.Recorder) -> dict:
        record = self.labels[example["index"]]
        if not len(record.labels):
            raise BadExample("it could not be read when it was labelled")
        image = transforms.decode(example["image"])
        made = self.transform({**example, "image": image}, rng)
        box = label_maps.crop_box(self.transform, *image.shape[:2], tape.Player(rng.tape))
        [found] = record.labels
        classes = self.labels.made["data"]["num_classes"]
        logp = label_maps.pool(found["scores"], found["classes"], box, classes)
        return {**made, "known_logp": logp, "known_lse": np.float32(0)}


class PooledViews(views.Views):
    """The transform of label maps: a new view each time, labelled by the part of the map that it shows.

    Mixed images have mixed labels, in probabilities.
    """

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """A view and its labels; raises BadExample where the image could or can not be decoded."""
        return self.draw(example, rng)[1]

    def _result(self, made, other, mix):
        found = super()._result(made, other, mix)
        if mix is not None:
            shares = (np.float32(lam) for lam in (mix.lam, 1 - mix.lam))
            parts = [share * np.exp(each["known_logp"]) for share, each in zip(shares, (made, other), strict=True)]
            found["known_logp"] = np.log(np.maximum(sum(parts), np.float32(1e-30)))
        return found
