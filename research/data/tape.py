"""The random draws of a transform as an explicit list of numbers: recorded once, replayed exactly.

`Recorder` and `Player` are used in the place of a NumPy Generator. What a recorder draws is written down with as many
bits as it then uses, so that a player gives the same numbers whatever NumPy's generators become. A draw is one 32-bit
word: a fraction k / 2^32, an integer counted from its lowest value, or the bits of a float32. Large arrays of normal
noise (pixels that are erased) are two words, the seed of a generator that is defined here. Arithmetic on the words is
IEEE's, so images differ between machines only where Pillow, OpenCV or the C library's exp and log do.
"""

import abc
import functools
import math
import statistics
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

EXPLICIT = 16  # most normal numbers of one draw that are written down; more are made from a seed
FRACTION, INTEGER, CHOICE, ORDER, NORMAL, SEED = (ord(letter) for letter in "ficons")
_NAMES = {FRACTION: "a fraction", INTEGER: "an integer", CHOICE: "a choice", ORDER: "a permutation"}
_NAMES |= {NORMAL: "a normal number", SEED: "a seed of noise"}
_ALL = 1 << 32
_STEP, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64


class Mismatch(ValueError):
    """A transform asks for other draws than were recorded."""


class Tape(NamedTuple):
    """Recorded draws.

    Attributes:
      kinds: one byte a word: FRACTION, INTEGER, CHOICE, ORDER, NORMAL or SEED.
      words: as many integers below 2^32.
    """

    kinds: bytes
    words: tuple[int, ...]


def pack(tape: Tape) -> bytes:
    """A tape as bytes: uint16 count, the kinds, the words; little-endian, five bytes a draw."""
    return struct.pack("<H", len(tape.kinds)) + tape.kinds + np.asarray(tape.words, "<u4").tobytes()


def unpack(data: bytes, start: int = 0) -> tuple[Tape, int]:
    """(the tape that begins at `start`, where it ends); raises ValueError for bytes that hold none."""
    count = struct.unpack_from("<H", data, start)[0] if len(data) >= start + 2 else 0
    words, end = start + 2 + count, start + 2 + 5 * count
    if len(data) < end or not len(data):
        raise ValueError(f"a tape of {count} draws in {len(data) - start} bytes")
    return Tape(bytes(data[start + 2 : words]), tuple(np.frombuffer(data, "<u4", count, words).tolist())), end


def noise(seed: int, size: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers of a 64-bit seed, float64 of shape `size`: the same on every machine, for ever.

    Each is one of 65,536 quantiles, chosen by 16 bits of splitmix64 (Steele, Lea, Flood 2014): fine enough for what is
    rounded to 256 values.
    """
    count = math.prod(size)
    with np.errstate(over="ignore"):
        bits = np.uint64(seed) + np.arange(1, -(-count // 4) + 1, dtype=np.uint64) * np.uint64(_STEP)
        for shift, factor in zip((30, 27), _MIX, strict=True):
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    bits = bits ^ (bits >> np.uint64(31))
    return _quantiles()[bits.astype("<u8").view("<u2")[:count]].reshape(size)


@functools.cache
def _quantiles() -> np.ndarray:
    """The (i + 1/2) / 2^16 quantiles of the normal distribution, in multiples of 2^-24."""
    normal = statistics.NormalDist()
    upper = [round(normal.inv_cdf((i + 0.5) / 65536) * 2**24) for i in range(32768, 65536)]
    return np.array([-value for value in reversed(upper)] + upper) / 2**24


class _Draws(abc.ABC):
    """The part of np.random.Generator that transforms use, on words that a subclass provides."""

    @abc.abstractmethod
    def _words(self, kind: int, below: int, count: int, draw: Callable[[], Sequence[int]]) -> list[int]:
        """`count` words of a kind: those that `draw` gives, or the next of a tape."""

    def random(self) -> float:
        return self._words(FRACTION, _ALL, 1, lambda: [self._rng.integers(0, _ALL)])[0] / _ALL

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * self.random()

    def integers(self, low: int, high: int | None = None, size: int | None = None):
        low, high = (0, low) if high is None else (low, high)
        count = 1 if size is None else size
        words = self._words(INTEGER, high - low, count, lambda: self._rng.integers(0, high - low, count))
        return low + words[0] if size is None else low + np.array(words)

    def choice(self, options: int, size: int, replace: bool = True, p=None) -> np.ndarray:
        return np.array(self._words(CHOICE, options, size, lambda: self._rng.choice(options, size, replace, p)))

    def permutation(self, count: int) -> np.ndarray:
        return np.array(self._words(ORDER, count, count, lambda: self._rng.permutation(count)))

    def normal(self, loc: float = 0.0, scale: float = 1.0, size: int | tuple[int, ...] | None = None):
        shape = () if size is None else (size,) if isinstance(size, int) else tuple(size)
        count = math.prod(shape)
        if count > EXPLICIT:
            high, low = self._words(SEED, _ALL, 2, lambda: self._rng.integers(0, _ALL, 2))
            return loc + scale * noise(high << 32 | low, shape)
        drawn = lambda: self._rng.standard_normal(count, np.float32).view("<u4")
        words = self._words(NORMAL, _ALL, count, drawn)
        values = np.array(words, "<u4").view("<f4").astype(np.float64)
        return loc + scale * (float(values[0]) if size is None else values.reshape(shape))


class Recorder(_Draws):
    """Draws from a Generator and writes every draw down; `tape` is what was drawn so far."""

    def __init__(self, rng: np.random.Generator):
        self._rng, self._kinds, self._drawn = rng, bytearray(), []

    def _words(self, kind, below, count, draw):
        words = [int(word) for word in draw()]
        self._kinds += bytes([kind]) * count
        self._drawn += words
        return words

    @property
    def tape(self) -> Tape:
        return Tape(bytes(self._kinds), tuple(self._drawn))


class Player(_Draws):
    """Gives the draws of a tape in the place of random ones.

    Raises:
      Mismatch: (from a draw, or from `close`) other draws are asked for than were recorded.
    """

    def __init__(self, tape: Tape):
        self._tape, self._next = tape, 0

    def _words(self, kind, below, count, draw):
        first, self._next = self._next, self._next + count
        kinds, words = self._tape.kinds[first : self._next], self._tape.words[first : self._next]
        if kinds != bytes([kind]) * count:
            there = _NAMES.get(kinds[0], "something else") if kinds else "nothing more"
            raise Mismatch(f"draw {first + 1} asks for {_NAMES[kind]}, recorded is {there}")
        if words and max(words) >= below:
            raise Mismatch(f"draw {first + 1} asks for {_NAMES[kind]} below {below}, recorded is {max(words)}")
        return list(words)

    def close(self) -> None:
        """Says that no draw will follow; raises Mismatch where some were not asked for."""
        if self._next != len(self._tape.kinds):
            raise Mismatch(f"{self._next} draws are asked for, {len(self._tape.kinds)} are recorded")


def record(transform: Callable[[dict, Recorder], dict], example: dict, rng: np.random.Generator) -> tuple[dict, Tape]:
    """(`transform(example, rng)`, the draws it made)."""
    recorder = Recorder(rng)
    return transform(example, recorder), recorder.tape


def replay(transform: Callable[[dict, Player], dict], example: dict, tape: Tape) -> dict:
    """`transform` of the same example with the draws of a tape: the result it was recorded with.

    Raises:
      Mismatch: the transform, or the example, is another one and asks for other draws.
    """
    player = Player(tape)
    result = transform(example, player)
    player.close()
    return result
