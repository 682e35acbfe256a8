"""Colour and geometry augmentation of single images, with the numbers of timm 0.6.5.

Operations take a PIL RGB image and give one; the random ones take a NumPy Generator as well. RandAugment follows
Cubuk et al., arXiv 1909.13719, in timm's form: its operations, magnitudes and option strings.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from research.core.errors import UserError

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
INTERPOLATIONS = {"bilinear": (BILINEAR,), "bicubic": (BICUBIC,), "random": (BILINEAR, BICUBIC)}
TOP = 10.0  # the magnitude scale: an operation's range is spanned by 0..10


def _affine(image, matrix, interpolation, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=interpolation, fillcolor=fill)


def _solarize_add(image, amount, threshold=128):
    table = [min(255, value + amount) if value < threshold else value for value in range(256)]
    return image.point(table * 3)


def _posterize(image, bits):
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _enhance(kind):
    return lambda image, factor: kind(image).enhance(factor)


# Operations on pixels: (image, argument) -> image; None as argument where the operation has no strength.
PIXELS: dict[str, Callable] = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "Posterize": _posterize,
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
}
# Operations on places: (image, argument, interpolation, fill colour) -> image; translation in parts of the side.
PLACES: dict[str, Callable] = {
    "Rotate": lambda image, degrees, how, fill: image.rotate(degrees, resample=how, fillcolor=fill),
    "ShearX": lambda image, factor, how, fill: _affine(image, (1, factor, 0, 0, 1, 0), how, fill),
    "ShearY": lambda image, factor, how, fill: _affine(image, (1, 0, 0, factor, 1, 0), how, fill),
    "TranslateXRel": lambda image, part, how, fill: _affine(image, (1, 0, part * image.width, 0, 1, 0), how, fill),
    "TranslateYRel": lambda image, part, how, fill: _affine(image, (1, 0, 0, 0, 1, part * image.height), how, fill),
}
# timm's set, in its order (the order gives the numbers that are drawn their meaning), and its only table of weights.
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
WEIGHTS = (0.025, 0.005, 0.0, 0.3, 0.0, 0.005, 0.005, 0.025, 0.005, 0.005, 0.025, 0.2, 0.2, 0.1, 0.1)
_SIGNED = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}


def strength(name: str, magnitude: float, increasing: bool, sign: int) -> float | int | None:
    """The argument of operation `name` at `magnitude` (0..10, or above with mmax).

    `sign` is +1 or -1 and matters to operations with a direction. With `increasing` (timm's `inc1`) a larger magnitude
    always means a stronger change; without, Posterize keeps more bits and Solarize spares more pixels as it grows, and
    the enhancements go from 0.1 through 1 (no change) to 1.9.
    """
    level = magnitude / TOP
    if name in _SIGNED:
        return sign * level * _SIGNED[name]
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return max(0.1, 1.0 + sign * level * 0.9) if increasing else level * 1.8 + 0.1
    if name == "SolarizeAdd":
        return int(level * 110)
    if name in ("Posterize", "Solarize"):
        span = 4 if name == "Posterize" else 256
        return span - int(level * span) if increasing else int(level * span)
    return None


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """`layers` random operations, each applied with probability one half.

    Attributes:
      magnitude: 0..10.
      layers: operations drawn an image; with replacement, unless weighted.
      std: standard deviation of normal noise on the magnitude; infinite draws it uniformly from 0 to `magnitude`.
      top: upper bound of the noisy magnitude.
      increasing: use the operations whose effect grows with the magnitude.
      weighted: draw by timm's weights (mostly geometry) instead of evenly.
    """

    magnitude: float = TOP
    layers: int = 2
    std: float = 0.0
    top: float = TOP
    increasing: bool = False
    weighted: bool = False

    def __call__(self, image, rng: np.random.Generator, *, interpolation=(BILINEAR, BICUBIC), fill=(124, 116, 104)):
        """Augments a PIL image; geometry draws one of `interpolation` and paints `fill` where nothing is."""
        weights = np.array(WEIGHTS) / sum(WEIGHTS) if self.weighted else None
        for number in rng.choice(len(OPERATIONS), self.layers, replace=not self.weighted, p=weights):
            if rng.random() > 0.5:
                continue
            name = OPERATIONS[number]
            argument = strength(name, self._magnitude(rng), self.increasing, -1 if rng.random() > 0.5 else 1)
            if name in PLACES:
                image = PLACES[name](image, argument, interpolation[rng.integers(len(interpolation))], fill)
            else:
                image = PIXELS[name](image, argument)
        return image

    def _magnitude(self, rng: np.random.Generator) -> float:
        value = self.magnitude
        if math.isinf(self.std):
            value = rng.uniform(0, value)
        elif self.std > 0:
            value = rng.normal(value, self.std)
        return min(max(value, 0.0), self.top)


def parse_rand_augment(text: str) -> RandAugment:
    """Reads timm's option string, e.g. `rand-m9-n3-mstd0.5-inc1`.

    Parts: `m` magnitude, `n` operations, `mstd` noise (above 100: uniform), `mmax` upper bound, `inc1` increasing set,
    `w0` weighted choice. Raises UserError for anything else. `inc0` is refused too, since timm reads it as `inc1`.
    """
    head, *parts = text.split("-")
    found: dict[str, str] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd(?=\d+(?:\.\d+)?$)|(?:mmax|m|n|inc|w)(?=\d+$))([\d.]+)", part)
        if match is None or match[1] in found:
            raise _unknown(text, f"{part!r} is {'given twice' if match else 'not understood'}")
        found[match[1]] = match[2]
    if head != "rand":
        raise _unknown(text, "it does not begin with 'rand'")
    if found.get("inc") == "0":
        raise _unknown(text, "timm reads inc0 as inc1; leave it out, or write inc1")
    if found.get("inc", "1") != "1" or found.get("w", "0") != "0" or "0" in (found.get("n"), found.get("mmax")):
        raise _unknown(text, "inc is 1, w is 0, n and mmax are at least 1")
    std = float(found.get("mstd", 0))
    return RandAugment(
        magnitude=int(found.get("m", TOP)),
        layers=int(found.get("n", 2)),
        std=math.inf if std > 100 else std,
        top=int(found.get("mmax", TOP)),
        increasing="inc" in found,
        weighted="w" in found,
    )


def _unknown(text: str, why: str) -> UserError:
    return UserError(f"augment.auto: {text!r}: {why}; write it as rand-m9-n2-mstd0.5-inc1 (parts m n mstd mmax inc w)")


def jitter_color(image, rng: np.random.Generator, amounts: tuple[float, ...]):
    """Changes brightness, contrast, saturation and (where a fourth amount is given) hue, in random order.

    The first three scale by a factor uniform in [max(0, 1 - amount), 1 + amount]; hue turns by up to +-amount of the
    colour circle, with amount at most 0.5. As torchvision's ColorJitter.
    """
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for number in rng.permutation(len(amounts)):
        amount = amounts[number]
        if not amount:
            continue
        if number < 3:
            image = kinds[number](image).enhance(rng.uniform(max(0.0, 1 - amount), 1 + amount))
        else:
            image = _turn_hue(image, rng.uniform(-amount, amount))
    return image


def _turn_hue(image, turn: float):
    hue, saturation, value = image.convert("HSV").split()
    table = [(step + int(turn * 255)) % 256 for step in range(256)]
    return Image.merge("HSV", (hue.point(table), saturation, value)).convert("RGB")


def erase(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    mode: str = "pixel",
    count: int = 1,
    mean: tuple[float, ...] = (124, 116, 104),
    std: tuple[float, ...] = (58, 57, 57),
) -> np.ndarray:
    """Random erasing (Zhong et al., arXiv 1708.04896) of a uint8 (H, W, 3) array, with timm's areas and shapes.

    Up to 10 tries draw a box of 2 to 33 % of the area (shared among `count` boxes), log-uniform in shape from 0.3 to
    1/0.3. timm erases after normalisation, with zero (`const`), one normal colour a box (`rand`) or normal noise
    (`pixel`). Pixels here are still 0..255, so the same values are written as mean + std * normal, rounded and clipped.
    """
    image = image.copy()
    height, width, channels = image.shape
    for _ in range(rng.integers(1, count + 1)):
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width / count
            shape = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if h < height and w < width:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                noise = rng.normal(size={"const": 0, "rand": channels, "pixel": (h, w, channels)}[mode])
                color = np.add(mean, np.multiply(std, noise)) if mode != "const" else np.array(mean)
                image[top : top + h, left : left + w] = np.clip(np.rint(color), 0, 255)
                break
    return image


ERASE_MODES = ("const", "rand", "pixel")
