"""Text as windows of tokens, for language models.

Texts come from `.txt` files in a folder or a zip; without either they are sentences of a small grammar, made up anew
and always the same, so that something can be trained where there is no text at all. The texts of a split, one after the
other, are one row of tokens, cut into windows that do not overlap: the protocol of `research.language.perplexity`.
"""

import fnmatch
import functools
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from research.core import storage
from research.core.errors import UserError
from research.data import tokens as tokenisers
from research.data.base import Source, choose_split, existing, nearest

TRAIN = "train"
TOKENIZER = "tokenizer.json"
CONTEXT = 256
BETWEEN = "\n\n"  # two texts
_MADE_UP = {TRAIN: (0, 4000), "test": (1, 400)}  # split -> seed and number of sentences


class Text(Source):
    """Windows of `context` tokens of a split's texts.

    Example i is `{'tokens': int32 (N,), 'index': i}` and starts at token `i * context`. It is longer than a window, by
    another one where there is as much: its transform in training takes `context` tokens from a random place among them,
    so that windows are others in every epoch; that of evaluation takes the first.

    Attributes:
      tokenizer: a `tokenizers.Tokenizer`; `class_names` are its tokens in the order of their ids.

    Args:
      path: a folder, a .zip or a .txt file; None (and no `files`) for the grammar's sentences, `train` and `test`.
      split: one of `files`.
      files: {split: patterns of file names}, relative to the folder and with `*` for anything. Files are read in the
        order of patterns and, of one pattern, of names; a file weighs more where it is named again.
      tokenizer: file or folder of one (`research.data.tokens.load`); without, a byte-level BPE is trained on `train`.
      vocab: number of tokens of that BPE.
      context: tokens of a window.
    Raises:
      UserError: a split or file that is not there or no UTF-8 text, a text shorter than a window, no tokeniser.
    """

    def __init__(
        self,
        path: str | None = None,
        split: str = TRAIN,
        files: Mapping[str, Sequence[str]] | None = None,
        tokenizer: str = "",
        vocab: int = 512,
        context: int = CONTEXT,
    ):
        if context < 2:
            raise UserError(f"data.options.context: {context}; a window has at least 2 tokens")
        if path and not files:
            raise UserError("data.options.files: not set; give the files of each split, {'train': ('*.txt',), ...}")
        if files and not path:
            raise UserError("data.path: not set; data.options.files are names in a folder or .zip, set it to that")
        self.context = context
        texts = functools.partial(_texts, path, files or {})
        own = texts(split)
        self.tokenizer = _tokenizer(tokenizer, vocab, lambda: own if split == TRAIN else texts(TRAIN))
        self.tokens = tokenisers.encode(self.tokenizer, BETWEEN.join(own))
        where = f"{path or 'made-up sentences'} ({split})"
        if len(self.tokens) < context:
            raise UserError(
                f"data.options.context: {context} tokens a window, but {where} has {len(self.tokens)}: "
                "lower it, or name more text"
            )
        names = sorted(self.tokenizer.get_vocab().items(), key=lambda pair: pair[1])
        super().__init__(where, [name for name, _ in names])

    def __len__(self) -> int:
        return len(self.tokens) // self.context

    def __getitem__(self, index: int) -> dict:
        self._inside(index)
        start = index * self.context
        return {"tokens": self.tokens[start : start + 2 * self.context], "index": np.int32(index)}

    def transform(self, train: bool):
        return Window(self.context, train)

    def leave(self, folder: storage.Path) -> None:
        """Writes the tokeniser: what a trained model reads is told by it alone."""
        storage.write(folder / TOKENIZER, self.tokenizer.to_str())


class Window:
    """Example -> its row of a batch, `context` tokens: from a random place in training, else the first."""

    def __init__(self, context: int, train: bool):
        self.context, self.train = context, train

    def __call__(self, example: dict, rng: np.random.Generator) -> dict:
        found, start = example["tokens"], 0
        if self.train:
            start = int(rng.integers(len(found) - self.context + 1))
        return {**example, "tokens": found[start : start + self.context]}


def context_of(options: Mapping) -> int:
    """Tokens of a window, by a config's `data.options`."""
    return options.get("context", CONTEXT)


def read(path: str | pathlib.Path, patterns: Sequence[str], key: str = "data.options.files") -> list[str]:
    """Texts of the files below `path`, a folder, a .zip or a .txt file, that match `patterns`, in their order.

    Args:
      path: the folder or file.
      patterns: of names, with `*` for anything; `key`: what messages call them.
    Raises:
      FileNotFoundError: nothing at `path`.
      UserError: a pattern without a file, a damaged zip, a file that is no UTF-8 text.
    """
    root = existing(path)
    if root.is_dir():
        names = {p.relative_to(root).as_posix(): p.read_bytes for p in sorted(root.rglob("*")) if p.is_file()}
        return _chosen(root, names, patterns, key)
    if root.suffix.lower() != ".zip":
        return _chosen(root, {root.name: root.read_bytes}, patterns, key)
    try:
        with zipfile.ZipFile(root) as archive:
            entries = sorted(name for name in archive.namelist() if not name.endswith("/"))
            return _chosen(root, {name: lambda name=name: archive.read(name) for name in entries}, patterns, key)
    except zipfile.BadZipFile as error:
        raise UserError(f"data.path: {path} is not a readable zip ({error}); copy or download it again") from None


def _chosen(root: pathlib.Path, names: Mapping, patterns: Sequence[str], key: str) -> list[str]:
    texts = []
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(f"{key}: {root} has no {pattern!r}{nearest(pattern, list(names))}")
        for name in found:
            try:
                texts.append(names[name]().decode())
            except UnicodeDecodeError as error:
                raise UserError(f"{key}: {name} in {root} is no UTF-8 text ({error})") from None
    return texts


def _texts(path: str | None, files: Mapping[str, Sequence[str]], split: str) -> list[str]:
    """The texts of one split."""
    if path:
        return read(path, files[choose_split(split, list(files), "data.options.files")])
    seed, count = _MADE_UP[choose_split(split, list(_MADE_UP), "the made-up text")]
    rng = np.random.default_rng(seed)
    return [" ".join(_sentence(rng) for _ in range(count))]


def _tokenizer(path: str, vocab: int, texts: Callable[[], Sequence[str]]):
    try:
        return tokenisers.load(path) if path else tokenisers.train_bpe_on(texts(), vocab)
    except FileNotFoundError as error:
        raise UserError(f"data.options.tokenizer: {error}") from None
    except ValueError as error:
        raise UserError(f"data.options.{'tokenizer' if path else 'vocab'}: {error}") from None


_WORDS = {
    "one": ("a {} lamp", "the {} house", "an old {} road", "her {} coat", "some {} paper", "their {} boat"),
    "kind": ("red", "green", "white", "small", "heavy", "broken", "quiet", "new", "warm", "long"),
    "does": ("stands near", "belongs to", "was sold with", "looks like", "came before", "is kept in", "hides"),
    "when": ("today", "every winter", "before noon", "in the end", "at night", "once more"),
    "link": ("and", "but", "because", "while", "although"),
}


def _sentence(rng: np.random.Generator) -> str:
    """A sentence of one or two clauses, such as "The red house hides a small lamp at night."."""
    pick = lambda part: _WORDS[part][rng.integers(len(_WORDS[part]))]
    clause = lambda: (
        f"{pick('one').format(pick('kind'))} {pick('does')} {pick('one').format(pick('kind'))} {pick('when')}"
    )
    text = f"{clause()} {pick('link')} {clause()}" if rng.random() < 0.4 else clause()
    return f"{text[0].upper()}{text[1:]}."
