"""The input bench trains on real images in a tiny form, and its arithmetic is that of its words."""

import json

import pytest
from rich.console import Console

from launch import bench, bench_input
from research.data import transforms
from tests.data.shard_maker import converted, numbered


def test_figures_are_printed(tmp_path, capsys):
    path = converted(tmp_path / "shards", all=numbered(20))
    words = ["input", "--model", "resnet8", "--size", "8", "--classes", "10", "--batch", "8", "--steps", "3"]
    words += ["--rounds", "1", "--seconds", "0.01", "--recipe", "eval", "--path", path]
    assert bench.main([*words, "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    for text in ("20 images (arrays)", "waiting for data", "of synthetic", "one core feeds"):
        assert text in out
    found = json.loads((tmp_path / "a.json").read_text())
    assert {len(rounds) for rounds in found["seconds"].values()} == {1} and len(found["seconds"]) == 2
    for name, rounds in found["seconds"].items():
        assert all(0 <= wait < second for wait, second in zip(found["waited"][name], rounds, strict=True))


def test_made_up_photographs_are_of_natural_size_and_differ(tmp_path):
    one, other = bench_input.photograph(0), bench_input.photograph(1)
    assert one != other and 80_000 < len(one) < 130_000
    assert transforms.decode(one).shape == (375, 500, 3)


def test_ratio_wait_and_limit(capsys):
    seconds = {bench_input.SYNTHETIC: [1.0, 1.0, 2.0], bench_input.REAL: [1.25, 2.0, 2.0]}
    waited = {bench_input.SYNTHETIC: [0.0] * 3, bench_input.REAL: [0.25, 0.2, 0.0]}
    found = bench_input.Bench("m", 10, seconds, waited, core=20.0, cores=2)
    assert found.ratios(bench_input.REAL) == [0.5, 0.8, 1.0] and found.share(bench_input.REAL) == pytest.approx(0.1)
    bench_input.report(found, Console(highlight=False, width=120))
    out = capsys.readouterr().out
    assert "input pipeline: 0.800 of synthetic (0.500 to 1.000 by round)" in out
    assert "one core feeds 20 images/s; 2 cores, doing nothing else, 40" in out
    assert "needs 0.5 cores" in out and "at most 0.800" in out


def test_mistakes_are_one_line(capsys):
    assert bench.main(["input", "--rounds", "0"]) == 1
    assert bench.main(["input", "--path", "/no/such/place"]) == 1
    error = capsys.readouterr().err
    assert "--rounds 0" in error and "nothing at /no/such/place" in error and error.count("\n") == 2
