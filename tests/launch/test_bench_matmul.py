"""`bench matmul` on tiny weights: what it times, the peers it finds, what it refuses."""

import json
import sys
import types

import jax
import pytest

from launch import bench_matmul
from research.core import peaks
from research.core.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """Of known peaks, with a qwix that computes in real numbers and refuses 3 bits, and no tokamax."""
    monkeypatch.setattr(peaks, "peak_flops", lambda dtype: 1e12)
    monkeypatch.setattr(peaks, "peak_bandwidth", lambda: 1e10)

    def quantised(x, qtype, channelwise_axes, tiled_axes=None):
        if qtype == "int3":
            raise ValueError("no 3 bits\nat all")
        return x

    library = types.SimpleNamespace(quantize=quantised, dot_general=jax.lax.dot_general)
    monkeypatch.setitem(sys.modules, "qwix", library)
    monkeypatch.setitem(sys.modules, "tokamax", None)


def test_all_are_timed_in_turns(machine, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out.json"
    words = "--shapes 64x32 --batch 1,3 --formats W3A16,W8A8 --group 32 --layers 2 --passes 1 --rounds 3 --json"
    assert bench_matmul.main([*words.split(), str(out)]) == 0
    cases = [bench_matmul.Case(**entry) for entry in json.loads(out.read_text())]
    assert [(case.shape, case.batch) for case in cases] == [([64, 32], 1), ([64, 32], 3)]
    for case in cases:
        assert list(case.seconds) == ["bfloat16 XLA", "float32 XLA", "W3A16", "W8A8", "W8A8 qwix"]
        assert all(len(taken) == 3 and min(taken) > 0 for taken in case.seconds.values())
        scales = 4 * 32
        assert case.nbytes["W3A16"] == 64 * 32 * 3 // 8 + 2 * 2 * scales and case.nbytes["W8A8"] == 64 * 32 + scales
        assert case.notes == ["W3A16 qwix: ValueError: no 3 bits", "tokamax: not installed (no module tokamax)"]
    text = capsys.readouterr().out
    assert "64 x 32, batch 3" in text and "tokamax: not installed" in text


def test_figures():
    seconds = {"float32 XLA": [2.0, 2.0, 2.0], "W4A16": [1.0, 0.5, 1.0]}
    case = bench_matmul.Case((4, 8), 2, {"W4A16": 20}, seconds, {}, [])
    assert case.ratios("W4A16", "float32 XLA") == [2, 4, 2]
    assert case.bandwidth("W4A16") == 20 and case.rate("W4A16") == 2 * 2 * 4 * 8
    assert bench_matmul.stored(jax.ShapeDtypeStruct((3, 4), "int4")) == 6


@pytest.mark.parametrize(
    "words,message",
    [
        ("--formats W4A16,W9A8", "'W9A8' is not of the form"),
        ("--shapes 64x", "must be such as 4096x4096"),
        ("--batch 1,0", "--batch: must be numbers"),
        ("--peers aqt", "no aqt"),
        ("--rounds 0", "--rounds 0: must be 1 or more"),
        ("--group -1", "--group -1"),
        ("--aot h100:8", "ahead of time for TPUs, not for cuda"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        bench_matmul.checked(bench_matmul.parser().parse_args(words.split()))
