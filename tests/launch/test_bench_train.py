"""`bench train` end to end on a small network, with a stand-in for PyTorch's process."""

import json
import stat
import sys

import pytest

from launch import bench_train

# Speaks the protocol of launch.bench_torch: "eager" is half a second a step, "compiled" does not work here.
PEER = """#!{python}
import json, sys
if "--compile" in sys.argv:
    print(json.dumps({{"error": "no compiler"}}), flush=True)
    sys.exit(1)
print(json.dumps({{"ready": {params}, "version": "torch 0, timm 0"}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"seconds": 0.5 * int(line)}}), flush=True)
"""


@pytest.mark.parametrize(
    "short, name",
    [
        ("deit_s", "deit_small_patch16_224"),
        ("vit_b", "vit_base_patch16_224"),
        ("deit3_l", "deit3_large_patch16_224"),
        ("r50", "resnet50"),
        ("resnet8", "resnet8"),
        ("convnext_tiny", "convnext_tiny"),
    ],
)
def test_short_names(short, name):
    assert bench_train.full_name(short) == name


def test_figures_and_comparison(tmp_path, capsys, golden):
    counts = json.loads((golden / "kdlosses" / "counts.json").read_text())["resnet8"]
    peer, out = tmp_path / "python", tmp_path / "out.json"
    peer.write_text(PEER.format(python=sys.executable, params=counts["params"]))
    peer.chmod(peer.stat().st_mode | stat.S_IXUSR)
    options = "--model resnet8 --size 32 --classes 100 --batch 8 --steps 2 --rounds 3".split()
    assert bench_train.main([*options, "--torch-python", str(peer), "--json", str(out)]) == 0

    found = json.loads(out.read_text())
    assert (found["params"], found["macs"]) == (counts["params"], counts["macs"])
    assert {name: len(times) for name, times in found["seconds"].items()} == {
        bench_train.BARE: 3,
        bench_train.LOOP: 3,
        bench_train.EAGER: 3,
    }
    assert found["seconds"][bench_train.EAGER] == [0.5] * 3
    assert all(0 < t < 10 for times in found["seconds"].values() for t in times)
    text = capsys.readouterr().out
    for part in (
        "examples/s",
        "MFU",
        "12,507,392",
        "engine overhead",
        "speed relative to PyTorch eager",
        "PyTorch compiled: not compared (no compiler)",
        "torch 0, timm 0",
    ):
        assert part in text
    assert "not the same model" not in text


def test_derived_figures():
    bench = bench_train.Bench("m", 1, 100, 8, 0.0, {"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}, [])
    assert bench.rate("a") == 4.0  # examples/s: 8 in the median 2 s
    assert bench.flops("a") == 6 * 100 * 4.0
    assert bench.ratios("a", "b") == [2.0, 1.0, 0.5]


def test_bad_options_are_one_line(capsys):
    assert bench_train.main(["--model", "deit_small_patch16"]) == 1
    assert bench_train.main(["--model", "deit_s", "--batch", "0"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "deit_small_patch16_224" in lines[0] and "--batch 0" in lines[1]
