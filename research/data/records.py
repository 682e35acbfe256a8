"""One labelled image as bytes: what a record of a shard holds.

A record is little-endian and has no padding:

    bytes  0-1   b"SR"
    byte   2     version, 1
    byte   3     0: the image is an encoded file (JPEG, PNG); 1: it is an array
    bytes  4-7   int32   label
    bytes  8-15  int64   index of the example in the source the record was made from
    arrays only:
    bytes 16-27  3 x uint32: height, width, channels
    then         the file's bytes as they were, or the array's uint8 values in C order

Any language reads it in a few lines; nothing in it is executed or needs another library.
"""

import struct
from typing import NamedTuple

import numpy as np

from research.data.base import BadExample

VERSION = 1
_MAGIC = b"SR"
_HEAD = struct.Struct("<2sBBiq")
_SHAPE = struct.Struct("<3I")
_ENCODED, _ARRAY = 0, 1


class Record(NamedTuple):
    """A labelled image.

    Attributes:
      image: an encoded file, or uint8 (H, W, C).
      label: class, from 0.
      index: number of the example in the source the record was made from.
    """

    image: bytes | np.ndarray
    label: int
    index: int


def pack(record: Record) -> bytes:
    """The bytes of a record."""
    image = record.image
    kind = _ARRAY if isinstance(image, np.ndarray) else _ENCODED
    head = _HEAD.pack(_MAGIC, VERSION, kind, record.label, record.index)
    if kind == _ENCODED:
        return head + image
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(f"an image array is uint8 (H, W, C), not {image.dtype} {image.shape}")
    return head + _SHAPE.pack(*image.shape) + image.tobytes()


def unpack(data: bytes) -> Record:
    """The record in `data`; raises BadExample for bytes of another format or version, or of another length."""
    if len(data) < _HEAD.size or data[:2] != _MAGIC:
        raise BadExample("not a record of launch.shards")
    _, version, kind, label, index = _HEAD.unpack_from(data)
    if version != VERSION or kind not in (_ENCODED, _ARRAY):
        raise BadExample(f"a record of version {version}, kind {kind}; this program reads version {VERSION}")
    if kind == _ENCODED:
        return Record(data[_HEAD.size :], label, index)
    start = _HEAD.size + _SHAPE.size
    shape = _SHAPE.unpack_from(data, _HEAD.size) if len(data) >= start else (0, 0, 0)
    if len(data) != start + int(np.prod(shape, dtype=np.int64)):
        raise BadExample("a record shorter or longer than its array")
    return Record(np.frombuffer(data, np.uint8, offset=start).reshape(shape), label, index)
