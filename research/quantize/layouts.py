"""How checkpoints of other programs lay out weights of few bits, read and written with NumPy.

Each layout is a pair of functions between a `Quantized` weight (K, N) along axis 0 and the arrays that a checkpoint
holds for one layer, by the end of their names. All have unsigned codes; 32-bit words are int32, scales are float16.

    autogptq  `qweight` (K b / 32, N): a stream of bits along K, so that 3-bit values 10 and 21 of 32 straddle words;
              `qzeros` (G, N b / 32) the same along N, of zero points less one; `scales` (G, N); `g_idx` (K,), the group
              of each input, in any order after act-order. "gptq_v2" has zero points as they are.
    autoawq   `qweight` (K, N / 8): words along N, whose nibbles hold columns 0, 2, 4, 6, 1, 3, 5, 7; `qzeros`
              (G, N / 8) alike; `scales` (G, N). 4 bits.
    tinychat  `qweight` (N / 4, K) int16: see `_interleave`; `scales` and `scaled_zeros` = -s z, (G filled up, N).
              4 bits.
    marlin    `B` (K / 16, 2 N): 16 x 16 tiles in the order of a tensor core's fragments; `s` (G, N) in that order.
              4 bits, zero points 8, groups of 128 or K.

Sources: AutoGPTQ `qlinear_cuda_old.py` (commit 9f7d3707), AutoAWQ `gemm.py` (88e4c76b), llm-awq `qmodule.py`
(d6e797a4), marlin `__init__.py` (2f6d7c10).
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from research.quantize.quantized import Quantized, check

WORD = 32
ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
    """How one kind of checkpoint holds a layer.

    Fields:
      write: Quantized -> {end of name: array}; read: ({end of name: array}, bits, group or None) -> Quantized.
      parts: ends of the names that `read` needs; bits: what it can hold.
    """

    write: Callable[[Quantized], dict[str, np.ndarray]]
    read: Callable[[Arrays, int, int | None], Quantized]
    parts: tuple[str, ...]
    bits: tuple[int, ...]


def to_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (L, M) as a stream of bits along the first axis, (L bits / 32, M) int32, the first in the lowest bits."""
    places = np.arange(bits, dtype=np.uint8)[:, None]
    stream = ((codes.astype(np.uint8)[:, None] >> places) & 1).reshape(-1, codes.shape[1])
    octets = np.packbits(stream, axis=0, bitorder="little").reshape(-1, 4, codes.shape[1])
    return np.ascontiguousarray(octets.swapaxes(1, 2)).view("<i4")[..., 0]


def from_words(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse, uint8 (L, M)."""
    octets = np.ascontiguousarray(words.astype("<i4"))[..., None].view(np.uint8).swapaxes(1, 2)
    stream = np.unpackbits(octets.reshape(-1, words.shape[1]), axis=0, bitorder="little")
    stream = stream.reshape(-1, bits, words.shape[1])
    return np.sum(stream << np.arange(bits, dtype=np.uint8)[:, None], axis=1, dtype=np.uint8)


def _parts(q: Quantized, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unsigned codes (K, N) in the order of the array, scales and zero points (G, N)."""
    check(q)
    if q.codes.ndim != 2 or q.axis != 0:
        raise ValueError(f"{layout} holds matrices (K, N) quantised along axis 0, not {q.shape} along axis {q.axis}")
    if q.bits not in LAYOUTS[layout].bits:
        raise ValueError(f"{layout} holds {', '.join(map(str, LAYOUTS[layout].bits))} bits, not {q.bits}")
    codes, scales = np.asarray(q.codes[: q.length]).astype(np.int32), np.asarray(q.scales)
    middle = 2 ** (q.bits - 1)
    zeros = np.full_like(scales, middle) if q.zeros is None else np.asarray(q.zeros)
    codes = codes + middle if q.zeros is None else codes
    if zeros.min() < 0 or zeros.max() >= 2**q.bits:
        raise ValueError(f"{layout} holds zero points from 0 to {2**q.bits - 1}, not {zeros.min()} to {zeros.max()}")
    if q.order is not None:
        codes = codes[np.argsort(np.asarray(q.order))]
    shape = scales.shape[0], codes.shape[1]
    return codes, np.broadcast_to(scales, shape), np.broadcast_to(zeros, shape)


def from_codes(
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    bits: int,
    group: int | None = None,
    order: np.ndarray | None = None,
) -> Quantized:
    """The weight of unsigned codes (K, N), or of signed ones where `zeros` is None; scales and zeros (G, N)."""
    k = codes.shape[0]
    group = min(group or -(-k // len(scales)), k)
    codes = np.pad(codes, ((0, len(scales) * group - k), (0, 0)))
    scales = scales.astype(np.float32)
    zeros = None if zeros is None else jnp.asarray(zeros.astype(np.float32))
    order = None if order is None else jnp.asarray(order, jnp.int32)
    return check(Quantized(jnp.asarray(codes), jnp.asarray(scales), zeros, order, bits, 0, group, k))


def _multiple(layout: str, shape: tuple[int, ...], k: int, n: int) -> None:
    if shape[0] % k or shape[1] % n:
        raise ValueError(f"{layout} holds multiples of {k} inputs and {n} outputs, not {shape[0]} and {shape[1]}")


def write_gptq(q: Quantized, offset: int = 1) -> dict[str, np.ndarray]:
    """`offset` is what zero points are less: 1, or 0 for "gptq_v2". Zero points below it wrap, as readers undo."""
    codes, scales, zeros = _parts(q, "autogptq")
    _multiple("autogptq", codes.shape, WORD, WORD)
    stored = (zeros.astype(np.int32) - offset) & (2**q.bits - 1)
    groups = np.arange(q.length, dtype=np.int32) // q.group
    if q.order is not None:
        groups = groups[np.argsort(np.asarray(q.order))]
    arrays = {"qweight": to_words(codes, q.bits), "qzeros": to_words(stored.T, q.bits).T}
    return arrays | {"scales": scales.astype(np.float16), "g_idx": groups}


def read_gptq(arrays: Arrays, bits: int, group: int | None = None, offset: int = 1) -> Quantized:
    codes = from_words(arrays["qweight"], bits)
    zeros = (from_words(arrays["qzeros"].T, bits).T.astype(np.int32) + offset) & (2**bits - 1)
    order = None
    if "g_idx" in arrays:
        groups = np.asarray(arrays["g_idx"])
        order = np.argsort(groups, kind="stable")
        sizes = np.bincount(groups, minlength=len(zeros))
        if len(sizes) != len(zeros) or (sizes[:-1] != sizes[0]).any() or sizes[-1] > sizes[0]:
            raise ValueError(f"g_idx: groups of {sorted(set(sizes.tolist()))} inputs differ in size")
        group, codes = int(sizes[0]), codes[order]
        order = None if (groups[:-1] <= groups[1:]).all() else order
    return from_codes(codes, arrays["scales"], zeros, bits, group, order)


def write_awq(q: Quantized) -> dict[str, np.ndarray]:
    codes, scales, zeros = _parts(_in_order(q, "autoawq"), "autoawq")
    _multiple("autoawq", codes.shape, 1, 8)
    packed = lambda a: to_words(a.reshape(len(a), -1, 8)[..., ORDER].reshape(a.shape).T, 4).T
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.astype(np.float16)}


def read_awq(arrays: Arrays, bits: int, group: int | None = None) -> Quantized:
    def unpacked(words):
        columns = from_words(words.T, bits).T
        return columns.reshape(len(words), -1, 8)[..., np.argsort(ORDER)].reshape(columns.shape)

    return from_codes(unpacked(arrays["qweight"]), arrays["scales"], unpacked(arrays["qzeros"]), bits, group)


def _interleave(k: int) -> np.ndarray:
    """Which of the K inputs TinyChat has at each place: of each 32, pairs of the four eights in turn, then each eight
    of the result in the order 0, 2, 4, 6, 1, 3, 5, 7. Its int16 then hold four outputs, 64 inputs of each in turn."""
    pairs = np.arange(WORD).reshape(4, 4, 2).swapaxes(0, 1).reshape(4, 8)
    return (np.arange(0, k, WORD)[:, None] + pairs[:, ORDER].reshape(1, WORD)).reshape(-1)


def write_tinychat(q: Quantized) -> dict[str, np.ndarray]:
    codes, scales, zeros = _parts(_in_order(q, "tinychat"), "tinychat")
    _multiple("tinychat", codes.shape, 64, 4)
    k, n = codes.shape
    rows = codes.T[:, _interleave(k)].reshape(n // 4, 4, k // 64, 64).swapaxes(1, 2).reshape(n // 4, k, 4)
    words = np.sum(rows.astype(np.uint16) << np.arange(0, 16, 4, dtype=np.uint16), axis=2, dtype=np.uint16)
    # Scales are filled up to what the kernels load at once.
    multiple = 8 * max(1, 128 // q.group)
    filled = [(0, -len(scales) % multiple), (0, 0)]
    scales = np.pad(scales.astype(np.float16), filled)
    scaled = np.pad(zeros.astype(np.float32), filled) * scales.astype(np.float32)
    return {"qweight": words.view(np.int16), "scales": scales, "scaled_zeros": -scaled.astype(np.float16)}


def read_tinychat(arrays: Arrays, bits: int, group: int | None = None) -> Quantized:
    words = np.ascontiguousarray(arrays["qweight"]).view(np.uint16)
    n, k = words.shape[0] * 4, words.shape[1]
    nibbles = (words[..., None] >> np.arange(0, 16, 4, dtype=np.uint16)) & 15
    rows = nibbles.reshape(n // 4, k // 64, 4, 64).swapaxes(1, 2).reshape(n, k)
    codes = rows[:, np.argsort(_interleave(k))].T.astype(np.uint8)
    group = min(group or k, k)
    scales, scaled = (arrays[name][: k // group].astype(np.float32) for name in ("scales", "scaled_zeros"))
    return from_codes(codes, scales, np.round(-scaled / scales), bits, group)


@functools.cache
def _fragments() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Marlin's order of four 16 x 16 tiles (1024), of the scales of groups (64), and of those of channels (32)."""
    thread, tile, side, part = np.ix_(np.arange(32), np.arange(4), np.arange(2), np.arange(4))
    rows = 2 * (thread % 4) + part % 2 + 8 * (part // 2)
    order = 16 * rows + thread // 4 + 8 * side + 256 * tile
    of_groups = np.arange(64).reshape(8, 8).T.reshape(-1)
    of_channels = np.concatenate([2 * i + np.array([0, 1, 8, 9, 16, 17, 24, 25]) for i in range(4)])
    return order.reshape(-1, 8)[:, ORDER].reshape(-1), of_groups, of_channels


def _scale_order(groups: int) -> np.ndarray:
    return _fragments()[1 if groups > 1 else 2]


def write_marlin(q: Quantized) -> dict[str, np.ndarray]:
    codes, scales, zeros = _parts(_in_order(q, "marlin"), "marlin")
    k, n = codes.shape
    _multiple("marlin", codes.shape, 128, 256)
    if q.group not in (128, k) or (zeros != 8).any():
        raise ValueError(f"marlin holds groups of 128 or all inputs and zero points 8, not groups of {q.group}")
    tiles = codes.reshape(k // 16, 16, n // 16, 16).swapaxes(1, 2).reshape(-1, 1024)
    words = to_words(tiles[:, _fragments()[0]].reshape(-1, 8).T, 4)
    order = _scale_order(len(scales))
    return {
        "B": words.reshape(k // 16, 2 * n),
        "s": scales.astype(np.float16).reshape(-1, len(order))[:, order].reshape(scales.shape),
    }


def read_marlin(arrays: Arrays, bits: int, group: int | None = None) -> Quantized:
    words, order = arrays["B"], _scale_order(len(arrays["s"]))
    k, n = words.shape[0] * 16, words.shape[1] // 2
    tiles = from_words(words.reshape(1, -1), bits).T.reshape(-1, 1024)[:, np.argsort(_fragments()[0])]
    codes = tiles.reshape(k // 16, n // 16, 16, 16).swapaxes(1, 2).reshape(k, n).astype(np.int8) - np.int8(8)
    scales = arrays["s"].reshape(-1, len(order))[:, np.argsort(order)].reshape(-1, n)
    return from_codes(codes, scales, None, bits, group)


def _in_order(q: Quantized, layout: str) -> Quantized:
    if q.order is not None:
        raise ValueError(f"{layout} has no groups of inputs that are no neighbours (act-order): write autogptq")
    return q


LAYOUTS = {
    "autogptq": Layout(write_gptq, read_gptq, ("qweight", "qzeros", "scales"), (2, 3, 4, 8)),
    "autogptq_v2": Layout(
        functools.partial(write_gptq, offset=0),
        functools.partial(read_gptq, offset=0),
        ("qweight", "qzeros", "scales"),
        (2, 3, 4, 8),
    ),
    "autoawq": Layout(write_awq, read_awq, ("qweight", "qzeros", "scales"), (4,)),
    "tinychat": Layout(write_tinychat, read_tinychat, ("qweight", "scales", "scaled_zeros"), (4,)),
    "marlin": Layout(write_marlin, read_marlin, ("B", "s"), (4,)),
}
