"""Views of images that can be made again: augmentation as a tape of draws, and mixup or cutmix with another image.

A `View` and the data set determine a uint8 image to the last bit. Mixing is done here, on the host and example by
example, so that a teacher that labels views and a student that learns from them see equal pixels; research.data.mixup
mixes whole batches on the device instead, with the same distributions.
"""

import dataclasses
import struct
import zlib
from typing import NamedTuple

import numpy as np

from research.core.errors import UserError
from research.data import tape, transforms
from research.data.base import BadExample, Source

_HEAD, _PARTNER, _LAM, _BOX = (struct.Struct(f"<{fields}") for fields in ("IB", "q", "f", "4H"))
MIX = ("mixup", "cutmix", "prob", "switch_prob")  # keys of a config's `mix` section that a `Mixing` has
_ALONE, _MIXUP, _CUTMIX = range(3)


class Mix(NamedTuple):
    """How two images become one.

    Attributes:
      partner: index of the other example.
      lam: share of the example's own label: of its pixels in mixup, of the area outside the box in cutmix.
      box: (top, bottom, left, right) in pixels, ends excluded, that cutmix takes from the partner; None for mixup.
    """

    partner: int
    lam: float
    box: tuple[int, int, int, int] | None


class View(NamedTuple):
    """One augmented, perhaps mixed, image of an example.

    Attributes:
      tape: draws of its augmentation.
      mix: the mixing, or None.
      partner_tape: draws of the partner's augmentation, or None.
      digest: CRC-32 of the finished pixels.
    """

    tape: tape.Tape
    mix: Mix | None
    partner_tape: tape.Tape | None
    digest: int


def pack(view: View) -> bytes:
    """A view as bytes: its digest, what mixing, its tape, then partner, lam or box, and the partner's tape."""
    mix = view.mix
    kind = _ALONE if mix is None else _MIXUP if mix.box is None else _CUTMIX
    parts = [_HEAD.pack(view.digest, kind), tape.pack(view.tape)]
    if mix is not None:
        parts += [_PARTNER.pack(mix.partner), _LAM.pack(mix.lam)]
        parts += [_BOX.pack(*mix.box)] if mix.box else []
        parts += [tape.pack(view.partner_tape)]
    return b"".join(parts)


def unpack(data: bytes) -> View:
    """The view in `data`; raises ValueError for other bytes."""
    try:
        digest, kind = _HEAD.unpack_from(data)
        own, place = tape.unpack(data, _HEAD.size)
        if kind == _ALONE:
            found = View(own, None, None, digest)
        else:
            (partner,), (lam,) = _PARTNER.unpack_from(data, place), _LAM.unpack_from(data, place + _PARTNER.size)
            place += _PARTNER.size + _LAM.size
            box = _BOX.unpack_from(data, place) if kind == _CUTMIX else None
            other, place = tape.unpack(data, place + (_BOX.size if box else 0))
            found = View(own, Mix(partner, lam, box), other, digest)
    except struct.error as error:
        raise ValueError(f"not a view ({error})") from None
    if place != len(data):
        raise ValueError(f"a view of {place} bytes in {len(data)}")
    return found


@dataclasses.dataclass(frozen=True)
class Mixing:
    """The distribution of mixing: attributes as the arguments of research.data.mixup.mix, drawn for each example."""

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5

    def draw(self, rng: np.random.Generator, size: int, examples: int) -> Mix | None:
        """A mixing of images of size x size pixels with one of `examples`; None where there is none."""
        if not (self.mixup or self.cutmix) or rng.random() >= self.prob:
            return None
        partner = int(rng.integers(examples))
        is_cut = rng.random() < (self.switch_prob if self.mixup and self.cutmix else float(self.cutmix > 0))
        alpha = self.cutmix if is_cut else self.mixup
        lam = np.float32(rng.beta(alpha, alpha))
        if not is_cut:
            return Mix(partner, float(lam), None)
        half, box = int(size * np.sqrt(1 - lam)) // 2, []
        for center in rng.integers(0, size, 2).tolist():
            box += [max(center - half, 0), min(center + half, size)]
        top, bottom, left, right = box
        return Mix(
            partner, float(np.float32(1 - (bottom - top) * (right - left) / size**2)), (top, bottom, left, right)
        )


def mixed(image: np.ndarray, partner: np.ndarray, mix: Mix) -> np.ndarray:
    """The uint8 mixture of two uint8 (H, W, 3) images; mixup is rounded."""
    if mix.box is None:
        lam = np.float32(mix.lam)
        return np.rint(lam * image + (np.float32(1) - lam) * partner).astype(np.uint8)
    top, bottom, left, right = mix.box
    image = image.copy()
    image[top:bottom, left:right] = partner[top:bottom, left:right]
    return image


@dataclasses.dataclass(frozen=True)
class Views:
    """Draws views of a data set, and makes recorded ones again.

    A result is {'image': uint8 (H, W, 3), 'label', 'index', 'partner': int32 label of the partner (the own one where
    nothing is mixed), 'lam': float32 share of the own label}.
    """

    source: Source
    transform: transforms.Train
    mixing: Mixing

    def draw(self, example: dict, rng: np.random.Generator) -> tuple[View, dict]:
        """(a new view of an example of the source, its result); raises BadExample where it cannot be decoded.

        A partner that cannot be decoded gives way to the next example that can.
        """
        made, own = tape.record(self.transform, example, rng)
        mix = self.mixing.draw(rng, self.transform.size, len(self.source))
        if mix is None:
            return View(own, None, None, _digest(made)), self._result(made, made, None)
        for step in range(len(self.source)):
            partner = (mix.partner + step) % len(self.source)
            try:
                other, tape_of_other = tape.record(self.transform, self.source[partner], rng)
            except BadExample:
                continue
            mix = mix._replace(partner=partner)
            result = self._result(made, other, mix)
            return View(own, mix, tape_of_other, _digest(result)), result
        raise UserError(f"data.path: none of the {len(self.source)} examples of {self.source.name} can be read")

    def replay(self, example: dict, view: View) -> dict:
        """The recorded view of an example of the source.

        Raises:
          tape.Mismatch: the transform asks for other draws than were recorded.
          BadExample: the image or its partner's cannot be decoded.
        """
        made = tape.replay(self.transform, example, view.tape)
        if view.mix is None:
            return self._result(made, made, None)
        other = tape.replay(self.transform, self.source[view.mix.partner], view.partner_tape)
        return self._result(made, other, view.mix)

    def _result(self, made: dict, other: dict, mix: Mix | None) -> dict:
        image = made["image"] if mix is None else mixed(made["image"], other["image"], mix)
        return {**made, "image": image, "partner": other["label"], "lam": np.float32(1 if mix is None else mix.lam)}


def matches(example: dict, view: View) -> bool:
    """Whether an example that was made again has the pixels of the recorded view."""
    return _digest(example) == view.digest


def _digest(example: dict) -> int:
    return zlib.crc32(np.ascontiguousarray(example["image"]))
