"""`bench tokens` on a small DeiT: what it times, what it divides, and what it refuses."""

import json

import pytest

from launch import bench_tokens
from research import tokens
from research.backbones import vit
from research.layers import reduction
from research.tokens import budget, evit, tome

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


def test_a_target_is_solved_for_with_a_clock_that_counts_multiply_adds(tmp_path, capsys, monkeypatch):
    """A device of 3e9 multiply-adds a second: reductions come out as `--reduce` takes them."""
    monkeypatch.setitem(vit.VARIANTS, "deit_tiny_patch16_224", TINY)
    monkeypatch.setattr(bench_tokens, "_rate", lambda *a: 3e9 / budget.macs(a[-1]).total)
    out = tmp_path / "out.json"
    words = "--model deit_t --size 64 --classes 5 --batch 2 --reduce tome:r=1,prop_attn=false --reduce evit:blocks=0+"
    small = {**TINY, "img_size": 64, "num_classes": 5}
    dense = 3e9 / budget.macs(vit.build(**small)).total
    assert bench_tokens.main([*words.split(), "--target", str(1.05 * dense), "--json", str(out)]) == 0
    found = [bench_tokens.Solved(**entry) for entry in json.loads(out.read_text())]
    for one, least in zip(found, (tome.reduction(1), evit.reduction(1.0, (0,))), strict=True):
        reduce = reduction.build(tokens.parse(one.reduce))
        assert type(reduce) is type(least) and one.macs == budget.macs(vit.build(**small, reduce=reduce)).total
        assert one.rate == 3e9 / one.macs >= 1.05 * dense and one.timed <= 7
    assert found[0].reduce.endswith(",prop_attn=false") and found[1].reduce.endswith(",blocks=0+")
    text = capsys.readouterr().out
    assert f"{1.05 * dense:g} images/s" in text and "tome:r=" in text and "evit:keep_rate=" in text


def test_a_target_is_timed_on_the_device(monkeypatch):
    """Any speed will do: of four choices up to three networks are run."""
    monkeypatch.setitem(vit.VARIANTS, "deit_tiny_patch16_224", TINY)
    monkeypatch.setitem(bench_tokens.CHOICES, "r", lambda patches: range(0, 8, 2))
    words = "--model deit_t --size 64 --classes 5 --batch 2 --passes 2 --rounds 1 --reduce tome:r=1 --target 1e-3"
    (found,) = bench_tokens.solve(bench_tokens.checked(bench_tokens.parser().parse_args(words.split())))
    assert found.reduce == "tome:r=0" and found.rate > 1e-3 and found.timed == 3


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
        ("--target 0", "--target 0: must be above 0"),
        ("--target 9 --reduce ats", "--reduce ats: --target solves for r or keep_rate"),
    ],
)
def test_refusals_are_one_line(words, text, capsys):
    assert bench_tokens.main(words.split()) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
