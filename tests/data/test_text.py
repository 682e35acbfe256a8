"""Text as a source: its tokens are the bytes of the files, and a batch is told by its step alone."""

import itertools
import pickle
import re
import zipfile

import numpy as np
import pytest

from research.core.errors import UserError
from research.data import pipeline, tokens
from research.data.sources import source
from research.data.text import read
from research.language.perplexity import windows

TEXTS = {"a.txt": "Ein Haus am See.", "b/one.txt": "zwei – drei", "b/two.txt": "four, five, six", "c.txt": "seven" * 9}
FILES = {"train": ("b/*", "a.txt"), "test": ("c.txt",)}
BYTES = 261  # five specials and all bytes: without room for a merge, tokens are bytes


@pytest.fixture
def folder(tmp_path):
    for name, text in TEXTS.items():
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(text)
    return tmp_path / "text"


def opened(path, split="train", **options):
    return source("text", str(path), split, **{"files": FILES, "vocab": BYTES, "context": 8, **options})


def written(found) -> bytes:
    """The bytes that tokens stand for, by GPT-2's table: printable ones are themselves, others follow from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = dict(zip(map(chr, plain), plain, strict=True))
    others = [byte for byte in range(256) if byte not in plain]
    table |= {chr(256 + number): byte for number, byte in enumerate(others)}
    return bytes(table[found.class_names[token]] for token in found.tokens)


def test_tokens_are_the_texts_in_the_order_of_patterns_and_names(folder):
    train, test = opened(folder), opened(folder, "test")
    assert written(train).decode() == "\n\n".join(TEXTS[name] for name in ("b/one.txt", "b/two.txt", "a.txt"))
    assert written(test).decode() == TEXTS["c.txt"]
    assert train.num_classes == BYTES and len(test) == 45 // 8
    twice = opened(folder, files={"train": ("a.txt", "a.txt")})
    assert written(twice).decode() == "\n\n".join(2 * [TEXTS["a.txt"]])


def test_a_zip_and_a_file_alone_are_read_alike(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        for name, text in TEXTS.items():
            archive.writestr(f"{name}", text)
    np.testing.assert_array_equal(opened(tmp_path / "text.zip").tokens, opened(folder).tokens)
    assert read(folder / "c.txt", ("*",)) == [TEXTS["c.txt"]]


def test_both_splits_have_the_vocabulary_of_the_training_files(folder, tmp_path):
    train, test = (opened(folder, split, vocab=266) for split in ("train", "test"))
    assert train.class_names == test.class_names and len(train.class_names) == 266
    learned = "".join(train.class_names[BYTES:])
    assert not {"se", "ev", "ve", "en"} & set(train.class_names) and learned  # the test split says little else
    train.leave(tmp_path / "run")
    again = opened(folder, tokenizer=str(tmp_path / "run" / "tokenizer.json"), vocab=0)
    np.testing.assert_array_equal(again.tokens, train.tokens)
    assert tokens.load(tmp_path / "run").to_str() == train.tokenizer.to_str()


def test_evaluation_sees_the_windows_of_the_protocol(folder):
    test = opened(folder, "test")
    with pipeline.eval_batches(test, test.transform(False), batch_size=3) as batches:
        found = list(batches)
    rows = np.concatenate([batch["tokens"] for batch in found])
    mask = np.concatenate([batch["mask"] for batch in found])
    np.testing.assert_array_equal(rows[mask > 0], windows(test.tokens, 8))
    assert rows.dtype == np.int32 and mask.tolist() == [1] * 5 + [0]


def test_training_windows_start_anywhere_and_follow_from_the_step(folder):
    train = pickle.loads(pickle.dumps(opened(folder)))  # as worker processes get it
    batches = lambda **options: pipeline.train_batches(train, train.transform(True), batch_size=4, seed=5, **options)
    take = lambda count, **options: list(itertools.islice(batches(**options), count))
    found = take(150)
    starts = set()
    for batch in found:
        for index, row in zip(batch["index"], batch["tokens"], strict=True):
            room = train.tokens[index * 8 : index * 8 + 16]
            places = [start for start in range(len(room) - 7) if np.array_equal(room[start : start + 8], row)]
            assert places
            starts |= {(int(index), start) for start in places}
    length = len(train.tokens)
    assert starts == {(i, s) for i in range(length // 8) for s in range(min(8, length - 8 * i - 8) + 1)}
    np.testing.assert_array_equal(take(1, start_step=131)[0]["tokens"], found[131]["tokens"])
    halves = [take(1, process_index=p, process_count=2)[0]["tokens"] for p in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), found[0]["tokens"])


def test_without_a_path_sentences_are_made_up_and_always_the_same():
    train, again, test = (source("text", split=split, vocab=300) for split in ("train", "train", "test"))
    np.testing.assert_array_equal(train.tokens, again.tokens)
    assert train.class_names == test.class_names and len(train) > 5 * len(test) > 100
    texts = [found.tokenizer.decode(found.tokens.tolist()) for found in (train, test)]
    sentence = r"[A-Z][a-z ]+\."
    assert all(re.fullmatch(rf"{sentence}( {sentence})*", text) for text in texts)
    first, second = (set(text.split(". ")) for text in texts)
    assert len(first & second) < 0.05 * len(second)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"files": {"train": ("b/three.txt",)}}, "data.options.files: .* has no 'b/three.txt'; did you mean b/t"),
        ({"files": None}, "data.options.files: not set"),
        ({"files": {"train": ("bad.bin",)}}, "bad.bin in .* is no UTF-8 text"),
        ({"split": "valid"}, "no 'valid'; data.options.files has 'train', 'test'"),
        ({"context": 49}, r"49 tokens a window, but .* \(train\) has 48"),
        ({"context": 1}, "data.options.context: 1; a window has at least 2"),
        ({"vocab": 100}, "data.options.vocab: vocab_size=100: bytes and special tokens alone are 261"),
        ({"tokenizer": "none.json"}, "data.options.tokenizer: no tokenizer.json"),
        ({"tokenizer": "bad.bin"}, "data.options.tokenizer: .* holds no intact tokeniser"),
        ({"colour": 1}, "data.options.colour: not an option of kind 'text', which takes files, tokenizer"),
    ],
)
def test_what_is_wrong_is_said(folder, options, message, monkeypatch):
    (folder / "bad.bin").write_bytes(b"\xff\xfe{")
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        opened(folder, **options)


def test_a_damaged_zip_and_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match="data.path: not set; data.options.files are"):
        opened("")
    (tmp_path / "text.zip").write_bytes(b"PK no more")
    with pytest.raises(UserError, match="is not a readable zip"):
        opened(tmp_path / "text.zip")
    with pytest.raises(FileNotFoundError, match="data.path: nothing at"):
        opened(tmp_path / "none")
