"""Text to tokens and back, and texts of several lengths as one batch.

Tokenisers are those of `research.data.tokens`, which data that is text needs too.
"""

from collections.abc import Sequence

import numpy as np

from research.data.tokens import SPECIALS, encode, load, train_bpe

__all__ = ["SPECIALS", "encode", "load", "pad_batch", "train_bpe"]


def pad_batch(rows: Sequence, pad: int = 0, *, side: str = "left", length: int | None = None):
    """Texts of several lengths as one batch: ids (B, N) int32, and a mask (B, N) bool, false at padding.

    Args:
      rows: token ids of each text; `side`: where padding goes, left for prompts and right for classifiers.
      length: N; the longest text's by default. Longer texts lose what exceeds it on the padded side.
    Raises:
      ValueError: no text, an empty one, or a `side` that is neither.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is neither left nor right")
    rows = [np.asarray(row, np.int32).reshape(-1) for row in rows]
    if not rows or not all(map(len, rows)):
        raise ValueError("a batch needs at least one text, and each text a token")
    length = length or max(map(len, rows))
    ids, mask = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        row = row[-length:] if side == "left" else row[:length]
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[index, where], mask[index, where] = row, True
    return ids, mask
