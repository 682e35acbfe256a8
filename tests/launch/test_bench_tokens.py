"""`bench tokens` on a small DeiT: what it times, what it divides, and what it refuses."""

import json

import pytest

from launch import bench_tokens
from research.backbones import vit
from research.tokens import budget, tome

TINY = {"embed_dim": 12, "depth": 2, "num_heads": 3}


def test_two_batch_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "deit_tiny_patch16_224", TINY)
    out = tmp_path / "out.json"
    words = "--model deit_t --size 64 --classes 5 --batch 1,3 --passes 3 --rounds 3 --reduce tome:r=4 --json"
    assert bench_tokens.main([*words.split(), str(out)]) == 0
    gains = [bench_tokens.Gain(**entry) for entry in json.loads(out.read_text())]
    assert [gain.batch for gain in gains] == [1, 3]
    small = {**TINY, "img_size": 64, "num_classes": 5}
    counts = [budget.macs(vit.build(**small, reduce=reduce)).total for reduce in (None, tome.reduction(4))]
    for gain in gains:
        assert gain.macs == dict(zip(("dense", "tome:r=4"), counts, strict=True))
        assert all(len(times) == 3 and min(times) > 0 for times in gain.seconds.values())
    text = capsys.readouterr().out
    assert "deit_tiny_patch16_224, batch 3" in text and "tome:r=4" in text


def test_figures():
    gain = bench_tokens.Gain("x", 2, {"dense": 300, "a": 200}, {"dense": [4.0, 6.0, 9.0], "a": [2.0, 4.0, 3.0]})
    assert gain.speedups("a") == [2.0, 1.5, 3.0] and gain.ratio("a") == 1.5
    assert gain.quotient("a") == pytest.approx(2.0 / 1.5)


@pytest.mark.parametrize(
    "words, text",
    [
        ("--model r50", "resnet50 has no tokens to reduce"),
        ("--batch 1,x", "--batch: must be numbers of 1 or more"),
        ("--rounds 0", "--rounds 0: must be 1 or more"),
        ("--reduce tomme:r=3", "'research.tokens.tomme' is not the import path"),
        ("--size 32 --reduce tome:r=3", "removes more tokens than"),
    ],
)
def test_refusals_are_one_line(words, text, capsys):
    assert bench_tokens.main(words.split()) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
