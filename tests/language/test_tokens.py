"""Tokenisers: trained on a text, written and read in every form, batches of several lengths."""

import json

import numpy as np
import pytest

from research.language import tokens

TEXT = "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.\n" * 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(TEXT)
    return folder, tokens.train_bpe([folder / "a.txt"], 300)


def test_any_text_is_written_and_read_back(trained):
    _, tokenizer = trained
    assert [tokenizer.token_to_id(special) for special in tokens.SPECIALS] == list(range(5))
    for text in (TEXT[:80], "naïve 日本\n\ttabs  and   spaces"):
        ids = tokens.encode(tokenizer, text)
        assert ids.dtype == np.int32 and ids.max() < 300
        assert tokenizer.decode(ids.tolist()) == text
    assert len(tokens.encode(tokenizer, TEXT)) < len(TEXT) / 2


def test_a_vocabulary_is_found_in_every_form(trained, tmp_path):
    folder, tokenizer = trained
    expected = tokens.encode(tokenizer, TEXT).tolist()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokens.encode(tokens.load(tmp_path), TEXT).tolist() == expected
    assert tokens.encode(tokens.load(tmp_path / "tokenizer.json"), TEXT).tolist() == expected
    state = json.loads(tokenizer.to_str())["model"]
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt" / "vocab.json").write_text(json.dumps(state["vocab"]))
    (tmp_path / "opt" / "merges.txt").write_text("\n".join(" ".join(pair) for pair in state["merges"]))
    assert tokens.encode(tokens.load(tmp_path / "opt"), TEXT).tolist() == expected


def test_an_uncased_bert_has_its_vocabulary_alone(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "fox", "##es", "run"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    found = tokens.encode(tokens.load(tmp_path), "The FOXES run?", specials=True)
    assert [words[index] for index in found] == ["[CLS]", "the", "fox", "##es", "run", "[UNK]", "[SEP]"]


def test_texts_of_several_lengths_are_padded_where_asked():
    ids, mask = tokens.pad_batch([[1, 2, 3], [4]], pad=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[True] * 3, [False, False, True]]
    ids, mask = tokens.pad_batch([[1, 2, 3], [4]], side="right", length=2)
    assert ids.tolist() == [[1, 2], [4, 0]] and mask.tolist() == [[True, True], [True, False]]
    assert tokens.pad_batch([[1, 2, 3]], length=2)[0].tolist() == [[2, 3]]


def test_what_is_not_there_or_does_not_fit_is_said(trained, tmp_path):
    folder, _ = trained
    with pytest.raises(FileNotFoundError, match="no tokenizer.json, vocab.json"):
        tokens.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="holds no intact tokeniser"):
        tokens.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no text file at"):
        tokens.train_bpe([tmp_path / "none.txt"], 300)
    with pytest.raises(ValueError, match="vocab_size=100: bytes and special tokens alone are 261"):
        tokens.train_bpe([folder / "a.txt"], 100)
    for rows, side, message in (([[1]], "top", "neither left nor right"), ([[1], []], "left", "each text a token")):
        with pytest.raises(ValueError, match=message):
            tokens.pad_batch(rows, side=side)
