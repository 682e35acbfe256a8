"""The input bench runs on a small tree, and `launch.bench` finds its measurements."""

import argparse
import sys

from launch import bench, bench_data
from tests.data.make import tree


def test_dispatch_knows_the_measurements():
    assert {"data", "train"} <= set(bench.names()) and "torch" not in bench.names()


def test_unknown_measurement_is_one_line(capsys):
    assert bench.main(["dta"]) == 1
    assert "no measurement 'dta'; did you mean data?" in capsys.readouterr().err
    assert bench.main([]) == 2 and "data" in capsys.readouterr().out


def test_missing_path_and_wrong_option_are_one_line(capsys):
    assert bench.main(["data", "--path", "/no/such/place"]) == 1
    error = capsys.readouterr().err
    assert "data.path: nothing at /no/such/place" in error and error.count("\n") == 1


def test_figures_are_printed(tmp_path, capsys):
    tree(tmp_path, ["a/1.jpg", "a/2.jpg", "b/1.jpg"])
    words = ["data", "--path", str(tmp_path), "--size", "16", "--batch", "4", "--seconds", "0.01", "--rounds", "1"]
    assert bench.main([*words, "--recipe", "eval", "--no-torch"]) == 0
    out = capsys.readouterr().out
    for text in ("3 images", "decoding", "one core", "threads", "workers", "images/s"):
        assert text in out
    assert "PyTorch" not in out


def test_interpreter_without_torch_is_told(tmp_path):
    tree(tmp_path, ["a/1.jpg"])
    options = argparse.Namespace(python=sys.executable, path=str(tmp_path), recipe="a2", size=16, batch=2)
    peer = bench_data.torch_peer(options)
    try:
        assert bool(peer.version) != ("No module named" in peer.reason)  # where torch and timm are, it is ready
    finally:
        peer.close()


def test_ratios_are_taken_round_by_round(capsys):
    from rich.console import Console

    rates = {bench_data.CORE: [200.0, 100.0, 120.0], bench_data.TORCH_CORE: [100.0, 100.0, 100.0]}
    bench_data.report(rates, 2, Console(highlight=False))
    assert "one core: 1.20 times PyTorch, one core (1.00 to 2.00 by round)" in capsys.readouterr().out
