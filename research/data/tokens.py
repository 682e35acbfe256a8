"""Text to tokens: published vocabularies from their files, small ones trained on the text at hand.

Everything is a `tokenizers.Tokenizer`. No vocabulary comes with this project: `load` is given the files of one.
"""

import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4, as RoBERTa and OPT have them


def load(path: str | os.PathLike) -> tokenizers.Tokenizer:
    """The tokeniser in a `tokenizer.json`, or in a folder.

    Args:
      path: that file, or a folder with one; or a folder with `vocab.json` and `merges.txt` (byte-level BPE, as OPT has
        them) or `vocab.txt` (WordPiece of an uncased BERT), whose special tokens are then the user's to add.
    Raises:
      FileNotFoundError: nothing of the kind there.
      ValueError: a damaged file.
    """
    path = pathlib.Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _byte_level(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
        if (path / "vocab.txt").is_file():
            return _word_pieces(models.WordPiece.from_file(str(path / "vocab.txt"), unk_token="[UNK]"))
    except Exception as error:  # The library raises nothing narrower.
        raise ValueError(f"{path} holds no intact tokeniser ({error}): fetch it again") from None
    raise FileNotFoundError(f"no tokenizer.json, vocab.json with merges.txt, or vocab.txt at {path}")


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word_pieces(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    first, last = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    if None not in (first, last):
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", last), ("[CLS]", first))
    return tokenizer


def train_bpe(
    files: Iterable[str | os.PathLike], vocab_size: int, specials: Sequence[str] = SPECIALS
) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens trained on text files: any text can be written with it.

    Save it with `tokenizer.save(path)`. The same files give the same vocabulary.

    Raises:
      FileNotFoundError: a file that is not there.
      ValueError: no room for the 256 bytes and the specials.
    """
    files = [os.fspath(file) for file in files]
    for file in files:
        if not os.path.isfile(file):
            raise FileNotFoundError(f"no text file at {file}")
    tokenizer, trainer = _untrained(vocab_size, specials)
    tokenizer.train(files, trainer)
    return tokenizer


def train_bpe_on(texts: Iterable[str], vocab_size: int, specials: Sequence[str] = SPECIALS) -> tokenizers.Tokenizer:
    """As `train_bpe`, on texts in memory."""
    tokenizer, trainer = _untrained(vocab_size, specials)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _untrained(vocab_size: int, specials: Sequence[str]) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(specials):
        least = len(alphabet) + len(specials)
        raise ValueError(f"vocab_size={vocab_size}: bytes and special tokens alone are {least}")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    return _byte_level(models.BPE()), trainer


def encode(tokenizer: tokenizers.Tokenizer, text: str, *, specials: bool = False) -> np.ndarray:
    """`text` as token ids (T,) int32; `specials` adds what the tokeniser puts around a text."""
    return np.array(tokenizer.encode(text, add_special_tokens=specials).ids, np.int32)
