"""Compiles for real TPU topologies, on a machine that has none."""

import importlib.util
import json
import pathlib
import shlex

import pytest

from launch import compile as launcher
from research.core import sharding
from research.pods import chips

pytestmark = [
    pytest.mark.libtpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
ROOT = pathlib.Path(__file__).parents[2]
# One config of each family, small enough for a test; a new folder of configs needs its line here.
FAMILIES = {
    "backbones": "configs/backbones/vanillanet.py:smoke",
    "distill": "configs/distill/vanilla_kd_r50_a2.py:smoke",
    "language": "configs/language/wikitext_small.py:smoke",
    "quantize": "configs/quantize/gpusq_vit_small.py:smoke",
    "tokens": "configs/tokens/ppt_deit_s.py:smoke",
}
TINY = ["--config", "tests/launch/tiny.py", "--config.eval.batch_size=16", "--train-only", "--json"]
# 13.5 GiB of parameters and moments, before gradients; a v5e chip has 16.
LARGE = "--config.students.small.options.embed_dim=12288"


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_every_family_is_compiled():
    assert {f.name for f in (ROOT / "configs").iterdir() if f.is_dir() and f.name != "__pycache__"} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_compiles_for_v5e(family, capsys):
    assert launcher.main(["--config", FAMILIES[family], "--topology", "v5e:2x2", "--json"]) == launcher.FITS
    found = last(capsys)
    for step in ("train", "eval"):
        one = found["steps"][step]
        assert one["peak_bytes"] == sum(one["memory"].values()) < one["hbm_bytes"]
        assert one["flops"] > 0 and one["cycles_seconds"] > 0 and 0 < one["mfu"] < 1
    assert any(row["kind"] == "all-reduce" for row in found["steps"]["train"]["collectives"])


def test_an_oversized_setting_is_refused_and_fit_finds_another(capsys):
    assert launcher.main([*TINY, "--topology", "v5e:2x2", LARGE]) == launcher.OUT_OF_MEMORY
    found = last(capsys)
    assert not found["fits"] and found["peak_bytes"] > found["hbm_bytes"]
    assert launcher.main([*TINY, "--topology", "v5e:2x2", LARGE, "--fit"]) == launcher.FITS
    found = last(capsys)
    assert found["fits"] and "--config.parallel.axes.fsdp=2" in found["overrides"]
    assert set(found["overrides"]) >= set(shlex.split(found["suggestions"][0])) - {"--config.parallel.accumulate=2"}


def test_slices_lie_along_data(capsys):
    devices = chips.devices(chips.parse("v5e:2x2*2"))
    mesh = sharding.mesh({"data": -1, "fsdp": 2}, devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    slices = [{d.slice_index for d in row.reshape(-1)} for row in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with_both = sharding.mesh({"data": 1, "fsdp": 8}, devices)  # possible, but fsdp crosses the slices
    assert [d.slice_index for d in with_both.devices.reshape(-1)] == [0] * 4 + [1] * 4


def test_two_slices_share_the_network_between_hosts(capsys):
    assert launcher.main([*TINY, "--topology", "v5e:2x2*2"]) == launcher.FITS
    found = last(capsys)
    assert found["chips"] == 8 and found["hosts"] == 2
    assert any(row["network"] and row["kind"] == "all-reduce" for row in found["collectives"])
