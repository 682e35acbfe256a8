"""bench lowbit: settings and methods by their texts, one line for each result, nothing done twice."""

import json

import jax
import numpy as np
import pytest

from launch import bench, bench_lowbit
from research import language
from research.core.errors import UserError
from research.language import checkpoint, llama, tokens
from research.quantize.rules import Rule

TEXT = "Nine old boats left the harbour. One sank.\n" * 8
MODEL = llama.build(vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A model's folder and a text, as the command wants them."""
    root = tmp_path_factory.mktemp("lowbit")
    (root / "text.txt").write_text(TEXT)
    (root / "model").mkdir()
    params = jax.device_get(jax.jit(lambda: language.init(MODEL, jax.random.key(1))["params"])())
    params = jax.tree.map(lambda x: np.asarray(x * 8 if x.ndim > 1 else x), params)
    checkpoint.save(root / "model", MODEL, {"params": params}, {"max_position_embeddings": 64})
    tokens.train_bpe([root / "text.txt"], 261).save(str(root / "model" / "tokenizer.json"))
    found = ["lowbit", "--model", root / "model", "--data", root / "text.txt", "--test", "*", "--texts", 4]
    found += ["--context", 16, "--windows", 4, "--batch", 2, "--settings", "W2A16", "W4A8g16"]
    return [str(word) for word in [*found, "--methods", "rtn", "gptq"]]


def test_every_result_is_a_line_and_is_not_measured_again(words, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results" / "lowbit.jsonl"
    assert bench.main([*words, "--out", str(out), "--seeds", "0"]) == 0
    first = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["setting"], line["method"]) for line in first] == [
        ("real", "real"),
        *((setting, method) for setting in ("W2A16", "W4A8g16") for method in ("rtn", "gptq")),
    ]
    of = {(line["setting"], line["method"]): line for line in first}
    assert of["real", "real"]["divergence"] == 0
    assert of["W4A8g16", "rtn"]["divergence"] < of["W2A16", "gptq"]["divergence"] < of["W2A16", "rtn"]["divergence"]
    calls, calibrate = [], bench_lowbit.calibration.calibrate
    monkeypatch.setattr(bench_lowbit.calibration, "calibrate", lambda *a, **o: calls.append(o) or calibrate(*a, **o))
    capsys.readouterr()
    assert bench.main([*words, "--out", str(out), "--seeds", "0", "1"]) == 0
    assert [call["seed"] for call in calls] == [1, 1]  # of GPTQ alone: rounding to nearest has no seed
    assert len(out.read_text().splitlines()) == len(first) + 2
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "divergence" in shown and " ± " in shown


def test_settings_are_rules():
    assert bench_lowbit.setting("W2A16g64") == Rule("^layers_", bits=2, group=64, pad=True)
    assert bench_lowbit.setting("W4A8", "awq") == Rule("^layers_", bits=4, activation_bits=8, rule="awq", pad=True)
    with pytest.raises(UserError, match="W4A17.*not of the form W4A16"):
        bench_lowbit.setting("W4A17")
    with pytest.raises(UserError, match="--settings: 'W2A16g' has no number of inputs to a scale after g"):
        bench_lowbit.setting("W2A16g")
