"""launch.perplexity: a uniform model's numbers by hand, a trained run's and a few-bit folder's by their own losses."""

import json
import math
import re

import jax
import numpy as np
import pytest

from launch import convert, perplexity, train
from research import language
from research.core import config as configs
from research.core import writers
from research.language import checkpoint, llama, tokens
from research.quantize import checkpoints, rules

TEXT = "Nine – or ten – old boats.\n\nOne sank.  " * 8
VOCAB = 261  # five specials and all bytes: tokens are bytes
SIZE = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def run(capsys, *words):
    """(exit status, standard output or, after a failure, the message)."""
    status = perplexity.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, err if status else out


def score(capsys, *words):
    status, out = run(capsys, *words, "--json")
    assert status == 0, out
    return json.loads(out)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with a text, and a model whose every next token is as likely as any other."""
    root = tmp_path_factory.mktemp("perplexity")
    (root / "text.txt").write_text(TEXT)
    (root / "other.txt").write_text("!")
    (root / "uniform").mkdir()
    model = llama.build(vocab_size=VOCAB, **SIZE)
    variables = jax.jit(lambda: language.init(model, jax.random.key(0)))()
    variables["params"]["lm_head"]["kernel"] = 0 * variables["params"]["lm_head"]["kernel"]
    checkpoint.save(root / "uniform", model, variables, {"max_position_embeddings": 64})
    tokens.train_bpe([root / "text.txt"], VOCAB).save(str(root / "uniform" / "tokenizer.json"))
    return root


def test_a_model_that_knows_nothing_by_hand(files, capsys):
    found = score(capsys, "--model", files / "uniform", "--data", files, "--files", "text.txt")
    size, words = len(TEXT.encode()), len(TEXT.split())
    assert size > len(TEXT) and words == 8 * 9
    assert (found["tokens"], found["bytes"], found["words"]) == (size, size, words)
    assert found["perplexity"] == pytest.approx(VOCAB, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(math.log2(VOCAB), rel=1e-5)
    assert math.log(found["word_perplexity"]) == pytest.approx(math.log(VOCAB) * size / words, rel=1e-5)
    status, shown = run(capsys, "--model", files / "uniform", "--data", files / "text.txt", "--context", "32")
    assert status == 0 and "bits per byte" in shown and "8.027" in shown and str(words) in shown


@pytest.mark.usefixtures("one_device")
def test_a_run_s_model_is_as_perplexed_as_its_training_said(tmp_path, capsys):
    config = configs.load("configs/language/wikitext_small.py:smoke")
    train.run(config, tmp_path / "run")
    assert convert.main(["--run", str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    held_out = train.open_data(config).eval
    (tmp_path / "test.txt").write_text(held_out.tokenizer.decode(held_out.tokens.tolist()))
    capsys.readouterr()
    found = score(capsys, "--model", tmp_path / "model", "--data", tmp_path / "test.txt")  # the context is the model's
    loss = writers.read_rows(tmp_path / "run")[-1]["eval/loss"]
    assert math.log(found["perplexity"]) == pytest.approx(loss, rel=1e-5)
    assert convert.main(["--run", str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 1
    assert "holds a model: choose another --to, or pass --overwrite" in capsys.readouterr().err
    assert convert.main(["--run", str(tmp_path / "model"), "--to", str(tmp_path / "x")]) == 1
    assert "no finished run of a language model" in capsys.readouterr().err
    assert convert.main(["--model", "resnet8", "--to", str(tmp_path / "x")]) == 1
    assert "--model with --from or --run" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["autogptq", "autoawq"])
def test_a_folder_of_few_bits_is_as_perplexed_as_what_it_stands_for(files, tmp_path, layout, capsys):
    model = llama.build(vocab_size=VOCAB, **SIZE)
    params = jax.jit(lambda: language.init(model, jax.random.key(1)))()["params"]
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    rule = rules.Rule("layers_", 4, 16)
    few = jax.jit(lambda tree: rules.quantize_params(tree, [rule]))(params)
    checkpoints.save(tmp_path / "few", model, {"params": few}, layout=layout)
    found = checkpoints.load(tmp_path / "few")
    checkpoint.save(tmp_path / "real", model, jax.jit(rules.dequantize_params)(found.variables))
    words = ("--data", files / "text.txt", "--tokenizer", files / "uniform", "--context", "32")
    few, real = (score(capsys, "--model", tmp_path / name, *words) for name in ("few", "real"))
    assert few["perplexity"] == pytest.approx(real["perplexity"], rel=1e-4)
    assert not np.isclose(few["perplexity"], VOCAB, rtol=0.05)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--files", "texts.txt"], "--files: .* has no 'texts.txt'; did you mean text.txt"),
        (["--files", "other.txt"], "--context: 64; give at least 2, and at most the text's 1 tokens"),
        (["--context", "1"], "--context: 1; give at least 2"),
        (["--data", "none.zip"], "nothing at none.zip"),
        (["--tokenizer", "none"], "no tokenizer.json"),
        (["--tokenizer", "LARGE"], "--tokenizer: it writes token 2[67].*, but the model knows 261"),
        (["--model", "BERT"], "--model: .* holds a Bert.*, which predicts no next token"),
        (["--model", "none"], "no config.json in none"),
        (["--batch-size", "0"], "--batch-size: 0 is not above 0"),
        (["--config.seed=1"], "--config.seed=1: a model has no config"),
    ],
)
def test_what_is_wrong_is_said(files, words, message, tmp_path, capsys):
    if "LARGE" in words:
        tokens.train_bpe([files / "text.txt"], 280).save(str(tmp_path / "large.json"))
    if "BERT" in words:
        size = {"vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
        bert = language.family("bert_base_uncased").build(**size, intermediate_size=4, max_position_embeddings=8)
        checkpoint.save(tmp_path, bert, jax.jit(lambda: language.init(bert, jax.random.key(0)))())
    words = [{"LARGE": tmp_path / "large.json", "BERT": tmp_path}.get(word, word) for word in words]
    given = ["--model", files / "uniform", "--data", files, "--files", "text.txt", *words]
    status, text = run(capsys, *given)
    assert status == 1
    assert re.search(message, text), text
