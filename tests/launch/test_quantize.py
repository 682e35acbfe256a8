"""launch.quantize: what it writes is what calibration finds, and computes so; every mistake on one line."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from launch import perplexity, quantize
from research import language
from research.language import checkpoint, llama, tokens
from research.quantize import calibration, inputs, methods, rules
from research.quantize.rules import Rule

TEXT = "Nine – or ten – old boats.\n\nOne sank.  " * 8
VOCAB = 261  # five specials and all bytes: tokens are bytes
CONTEXT, TEXTS = 24, 4
MODEL = llama.build(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def run(capsys, *words):
    """(exit status, standard output or, after a failure, the message)."""
    status = quantize.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, err if status else out


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with a text and a model of 16-bit weights, tokeniser and all."""
    root = tmp_path_factory.mktemp("quantize")
    (root / "text.txt").write_text(TEXT)
    (root / "model").mkdir()
    params = jax.jit(lambda: language.init(MODEL, jax.random.key(1))["params"])()
    params = jax.tree.map(lambda x: np.asarray(x * 8 if x.ndim > 1 else x, np.float16), params)
    checkpoint.save(root / "model", MODEL, {"params": params}, {"max_position_embeddings": 64, "bos_token_id": 0})
    tokens.train_bpe([root / "text.txt"], VOCAB).save(str(root / "model" / "tokenizer.json"))
    (root / "model" / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    return root


@pytest.fixture(scope="module")
def texts(root):
    """What the command calibrates with: windows of the text."""
    ids = tokens.encode(tokens.load(root / "model"), TEXT)
    found = calibration.draw(ids, TEXTS, CONTEXT)
    assert found.shape == (TEXTS, CONTEXT)
    assert all(any((ids[i : i + CONTEXT] == row).all() for i in range(len(ids))) for row in found)
    return found


def wide(root) -> dict:
    return checkpoint.load(root / "model").variables["params"]


def asked(root, out, *words):
    given = ["--model", root / "model", "--data", root / "text.txt", "--texts", TEXTS, "--context", CONTEXT]
    return [*given, "--out", out, *words]


def halves(params):
    """Scales as 16 bits hold them, and all else as in the model's file."""
    half = lambda x: np.asarray(x, np.float16).astype(np.float32)
    change = lambda x: dataclasses.replace(x, scales=half(x.scales)) if rules.is_few(x) else half(x)
    return jax.tree.map(change, params, is_leaf=rules.is_few)


@pytest.mark.parametrize("method, layout", [("rtn", "autogptq"), ("gptq:damping=0.02", "autoawq")])
def test_the_folder_computes_what_calibration_found(method, layout, root, texts, tmp_path, capsys):
    words = ("--method", method, "--bits", 4, "--group", 16, "--layout", layout)
    status, said = run(capsys, *asked(root, tmp_path / "out", *words))
    assert status == 0, said
    assert re.search(r"blocks 0 to 0 of 2: relative error \S+, \d+ s left\nblocks 1 to 1 of 2", said)
    settings = (Rule("^layers_", bits=4, group=16),)
    found = calibration.calibrate(MODEL, wide(root), texts, settings, methods.build(method))
    apply, loaded = perplexity.load(tmp_path / "out")
    assert (loaded.model, loaded.config["bos_token_id"]) == (MODEL, 0)
    real = jax.jit(rules.dequantize_params)
    expected, got = real(halves(found.params)), real(loaded.variables)["params"]
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    logits, plain = (jax.jit(lambda params, run=run: run({"params": params}, texts)[0]) for run in (apply, MODEL.apply))
    wanted = plain(expected)
    np.testing.assert_allclose(logits(loaded.variables["params"]), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(plain(wide(root)) - wanted).max() > 0.01 * np.abs(wanted).max()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((root / "model" / name).read_text())
    assert not (tmp_path / "out" / inputs.FILE).exists()


def test_real_numbers_with_rounded_inputs_that_other_bits_have(root, texts, tmp_path, capsys):
    """5 bits, which no layout holds; inputs are stated beside them; the same command goes on, another does not."""
    words = ("--method", "rtn", "--bits", 5, "--activation-bits", 4, "--layout", "real", "--work", tmp_path / "work")
    status, said = run(capsys, *asked(root, tmp_path / "out", *words))
    assert status == 0, said
    settings = (Rule("^layers_", bits=5, activation_bits=4),)
    expected = jax.jit(lambda tree: rules.fake(tree, settings))(wide(root))
    apply, loaded = perplexity.load(tmp_path / "out")
    assert loaded.model == MODEL
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, np.asarray(y, np.float16)), loaded.variables["params"], expected
    )
    by_rules, stated, plain = (
        jax.jit(lambda params, run=run: run({"params": params}, texts)[0])(loaded.variables["params"])
        for run in (rules.apply(MODEL, settings), apply, MODEL.apply)
    )
    np.testing.assert_array_equal(stated, by_rules)
    assert np.abs(stated - plain).max() > 0.01 * np.abs(plain).max()
    status, said = run(capsys, *asked(root, tmp_path / "out", *words))
    assert status == 1 and "holds a model: choose another, or pass --overwrite" in said
    status, said = run(capsys, *asked(root, tmp_path / "out", *words, "--overwrite"))
    assert status == 0 and "blocks" not in said  # nothing was left to do
    status, said = run(capsys, *asked(root, tmp_path / "out", *words, "--overwrite", "--seed", 1))
    assert status == 1 and "holds a calibration with data" in said


def test_learned_steps_are_stated(root, tmp_path):
    params, settings = wide(root), (Rule("mlp/", bits=4, activation_bits=6), Rule("q_proj", bits=4))
    steps = {"layers_0/mlp/up_proj": np.float32(0.1), "layers_1/mlp/down_proj": np.float32([[0.2], [0.3]])}
    inputs.write(tmp_path, params, settings, steps)
    found, learned = inputs.read(tmp_path)
    layers = {f"layers_{i}/mlp/{name}_proj": 6 for i in range(2) for name in ("gate", "up", "down")}
    assert {layer: rule.activation_bits for layer, rule in rules.match(params, found).items()} == layers
    assert all(rule.bits is None for rule in found)
    jax.tree.map(np.testing.assert_array_equal, learned, steps)
    assert all(step.dtype == np.float32 for step in learned.values())
    inputs.write(tmp_path, params, (Rule("q_proj", bits=4),), {})  # another model in the same folder
    assert inputs.read(tmp_path) == ((), {})
    (tmp_path / inputs.FILE).write_text('{"layers_0/mlp/up_proj": 4}')
    with pytest.raises(ValueError, match=r"inputs\.json is no intact statement of bits and steps"):
        inputs.read(tmp_path)


WRONG = {
    "--context: 400; give at least 2, and at most the text's 344 tokens": ["--context", 400],
    "--files: .* has no 'texts.txt'; did you mean text.txt": ["--files", "texts.txt"],
    "--layout: layers_0/.*autogptq holds 2, 3, 4, 8 bits, not 5; real holds everything": ["--bits", 5],
    "--layout: layers_0/.*autoawq holds 4 bits, not 3": ["--bits", 3, "--layout", "autoawq"],
    "--layout: layers_0/.*autoawq has no groups of inputs that are no neighbours": [
        *("--method", "gptq:act_order=true", "--group", 16, "--layout", "autoawq")
    ],
    "--bits, --group, --activation-bits: .*bits: 9": ["--bits", 9],
    "--activation-bits: .*activation_bits 1 is not from 2 to 8": ["--activation-bits", 1],
    "layers_0/.* group: 7 does not divide the": ["--group", 7],
    "method 'gtpq' is none of rtn": ["--method", "gtpq"],
    "method gptq has no option 'dampin=1'; write damping=": ["--method", "gptq:dampin=1"],
    "--texts: 0 is not above 0": ["--texts", 0],
    "--model: .*few has few bits already": ["--model", "FEW"],
    "no config.json in none": ["--model", "none"],
    "--config.seed=1: a model has no config to change": ["--config.seed=1"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said(message, root, tmp_path, capsys):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "config.json").write_text('{"model_type": "llama", "quantization_config": {}}')
    words = [tmp_path / "few" if word == "FEW" else word for word in WRONG[message]]
    given = ("--method", "rtn", "--bits", 4, *words)
    status, said = run(capsys, *asked(root, tmp_path / "out", *given))
    assert status == 1
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()
