"""From an encoded image to a uint8 array of the size a network wants: decoding, crops, flips, augmentation.

`build(train=True, size=224, ...)` gives a function `(example, rng) -> {'image', 'label', 'index'}`. All randomness is
the given Generator's; the pipeline makes one for every example from the seed and its place in the run. Crops, resizing
and operations are those of timm 0.6.5 on Pillow, equal in every bit, so that published numbers can be reproduced.
"""

import dataclasses
import functools
import io
import math

import cv2
import numpy as np
from PIL import Image

from research.core.errors import UserError
from research.data import augment
from research.data.base import BadExample, nearest

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROPS = ("resized", "pad", "none")
_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Decodes JPEG, PNG or whatever Pillow reads into a uint8 (H, W, 3) array; arrays only become RGB.

    The pixels are Pillow's `convert('RGB')`: EXIF rotation is not applied and transparency is dropped. OpenCV decodes
    common JPEGs, with the same result in four fifths of the time.

    Raises:
      BadExample: no image, truncated, or damaged beyond decoding.
    """
    if isinstance(image, np.ndarray):
        return image if image.shape[-1] == 3 else np.repeat(image, 3, axis=-1)
    try:
        opened = Image.open(io.BytesIO(image))
        # A JPEG without its end marker is Pillow's to judge: it says truncated where OpenCV may fill with grey.
        if opened.format == "JPEG" and opened.mode in ("RGB", "L") and image.rstrip(b"\0").endswith(b"\xff\xd9"):
            pixels = cv2.imdecode(np.frombuffer(image, np.uint8), _FLAGS)
            if pixels is not None:
                return pixels
        if opened.mode == "P":
            opened = opened.convert("RGBA")
        return np.asarray(opened.convert("RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error) if image else "the file is empty"
        raise BadExample("not an image" if "cannot identify" in reason else reason) from None


def resized_crop_box(
    rng: np.random.Generator, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) of a crop: area uniform in `scale` of the whole, aspect log-uniform in `ratio`.

    After ten draws that do not fit, the largest centre crop within `ratio` (Szegedy et al., arXiv 1409.4842; timm).
    """
    for _ in range(10):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def pad_crop(image: np.ndarray, rng: np.random.Generator, pad: int) -> np.ndarray:
    """A random crop of the image's own size after padding every side with `pad` black pixels."""
    height, width = image.shape[:2]
    top, left = rng.integers(0, 2 * pad + 1, 2)
    return np.pad(image, ((pad, pad), (pad, pad), (0, 0)))[top : top + height, left : left + width]


def center_crop(image: np.ndarray, size: int, crop: float, interpolation=augment.BICUBIC) -> np.ndarray:
    """Resizes the shorter side to floor(size / crop), keeping the aspect, and cuts the central size x size."""
    height, width = image.shape[:2]
    short = math.floor(size / crop)
    new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    resized = Image.fromarray(image)
    if new != (width, height):
        resized = resized.resize(new, interpolation)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@dataclasses.dataclass(frozen=True)
class Train:
    """The training transform, in timm's order: crop, flip, RandAugment or colour jitter, erasing.

    Attributes:
      size: side of the square result.
      crop: `resized` (random-resized crop), `pad` (CIFAR's: pad and crop at the image's own resolution, resized to
        `size` before where it differs), `none` (only resized).
      scale, ratio: area and aspect ranges of the random-resized crop.
      interpolation: `random` (bilinear or bicubic, drawn anew each time), `bilinear` or `bicubic`.
      pad: black pixels that `crop='pad'` adds to each side.
      flip: probability of a horizontal flip.
      auto: RandAugment as timm writes it, or empty.
      jitter: colour jitter; a number for brightness, contrast and saturation, or three or four (hue) numbers.
      erase: probability of random erasing; `erase_mode` const, rand or pixel; up to `erase_count` boxes.
      strong: RandAugment of a second view of the same image, drawn independently, which the result has as `strong`.
      mean, std: of the pixels in [0, 1]; the colours RandAugment and erasing paint with, nothing is normalised.
    """

    size: int
    crop: str = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "random"
    pad: int = 4
    flip: float = 0.5
    auto: str = ""
    jitter: float | tuple[float, ...] = 0.0
    erase: float = 0.0
    erase_mode: str = "pixel"
    erase_count: int = 1
    strong: str = ""
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __post_init__(self):
        _one_of("augment.crop", self.crop, CROPS)
        _one_of("augment.interpolation", self.interpolation, augment.INTERPOLATIONS)
        _one_of("augment.erase_mode", self.erase_mode, augment.ERASE_MODES)
        for key in ("scale", "ratio"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise UserError(f"augment.{key}: ({low}, {high}) is no range of positive numbers, smallest first")
        if len(self.jitters) not in (3, 4):
            raise UserError(f"augment.jitter: {self.jitter} has {len(self.jitters)} amounts; give one, three or four")
        if self.auto and any(self.jitters):
            raise UserError("augment.jitter: timm leaves colour jitter out under RandAugment; set jitter=0, or auto=''")
        self.policy, self.second  # noqa: B018  a wrong string is found here, not in the first example

    @functools.cached_property
    def policy(self) -> augment.RandAugment | None:
        return augment.parse_rand_augment(self.auto) if self.auto else None

    @functools.cached_property
    def second(self) -> "Train | None":
        return dataclasses.replace(self, auto=self.strong, strong="", jitter=0.0) if self.strong else None

    @property
    def jitters(self) -> tuple[float, ...]:
        return tuple(self.jitter) if isinstance(self.jitter, (tuple, list)) else (self.jitter,) * 3

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        """`{'image': uint8 (size, size, 3), 'label': int32, 'index': int32}`, and `strong`; raises BadExample."""
        hows = augment.INTERPOLATIONS[self.interpolation]
        whole = decode(example["image"])
        image = self._cropped(whole, rng, hows)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.policy:
            fill = tuple(min(255, round(255 * value)) for value in self.mean)
            image = self.policy(image, rng, interpolation=hows, fill=fill)
        elif any(self.jitters):
            image = augment.jitter_color(image, rng, self.jitters)
        pixels = np.asarray(image)
        if self.erase and rng.random() < self.erase:
            mean, std = ([255 * value for value in values] for values in (self.mean, self.std))
            pixels = augment.erase(pixels, rng, mode=self.erase_mode, count=self.erase_count, mean=mean, std=std)
        strong = {"strong": self.second({**example, "image": whole}, rng)["image"]} if self.second else {}
        return _result(pixels, example) | strong

    def _cropped(self, image: np.ndarray, rng: np.random.Generator, hows) -> Image.Image:
        if self.crop == "resized":
            top, left, h, w = resized_crop_box(rng, *image.shape[:2], self.scale, self.ratio)
            image = image[top : top + h, left : left + w]
        cut = Image.fromarray(np.ascontiguousarray(image))
        how = hows[rng.integers(len(hows))]
        if cut.size != (self.size, self.size):
            cut = cut.resize((self.size, self.size), how)
        return Image.fromarray(pad_crop(np.asarray(cut), rng, self.pad)) if self.crop == "pad" else cut


@dataclasses.dataclass(frozen=True)
class Eval:
    """The evaluation transform: shorter side to size / crop, then the central crop; equal to Pillow's in every bit.

    Attributes:
      size: side of the square result.
      crop: side of the crop over the resized shorter side, in (0, 1].
      interpolation: `bicubic` or `bilinear`.
    """

    size: int
    crop: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self):
        _one_of("eval.interpolation", self.interpolation, ("bilinear", "bicubic"))
        if not 0 < self.crop <= 1:
            raise UserError(f"eval.crop: {self.crop} is not in (0, 1]; timm's usual values are 0.875 to 1")

    def __call__(self, example: dict, rng: np.random.Generator | None = None) -> dict:
        """`{'image': uint8 (size, size, 3), 'label': int32, 'index': int32}`; raises BadExample."""
        how = augment.INTERPOLATIONS[self.interpolation][0]
        return _result(center_crop(decode(example["image"]), self.size, self.crop, how), example)


def build(*, train: bool, size: int, **options) -> Train | Eval:
    """The transform of a training or evaluation pipeline; options are the attributes of `Train` and `Eval`.

    Raises UserError for an unknown option or a value out of range, naming its key (`augment.…` or `eval.…`).
    """
    kind, group = (Train, "augment") if train else (Eval, "eval")
    names = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in names:
            raise UserError(f"{group}.{option}: no such option{nearest(option, names)} (it takes {', '.join(names)})")
    if size < 1:
        raise UserError(f"{group}.size: {size} is no size in pixels")
    return kind(size=size, **options)


def _result(pixels: np.ndarray, example: dict) -> dict:
    return {"image": pixels, "label": np.int32(example["label"]), "index": np.int32(example["index"])}


def _one_of(key: str, value: str, names) -> None:
    if value not in names:
        raise UserError(f"{key}: no {value!r}; it is one of {', '.join(names)}{nearest(value, list(names))}")
