"""Rows of published tables name networks that exist, and their counts are those made with the official code."""

import json
import pathlib

import pytest

from research import backbones
from research.backbones import published

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
# Entries of counts.json that differ from our names.
OFFICIAL = {"parameternet_300m": "parameternet_300m_derived_experts4"}


def test_every_row_is_of_a_network_that_exists():
    assert set(published.IMAGENET) <= set(backbones.variants())
    assert set(published.PRETRAINED) <= set(published.IMAGENET)


@pytest.fixture(scope="module")
def counts():
    return {
        name: entry
        for method in ("vanillanet", "parameternet", "backbones")
        for name, entry in json.loads((GOLDEN / method / "counts.json").read_text()).items()
    }


@pytest.mark.parametrize("name", [name for name, row in published.IMAGENET.items() if row.params or row.flops])
def test_published_counts_are_the_official_ones_rounded(counts, name):
    row = published.IMAGENET[name]
    aliases = (f"{name}_deploy", OFFICIAL.get(name), f"{name}_static_derived", name)
    entry = next(counts[alias] for alias in aliases if alias in counts)
    if row.params:
        assert row.params == pytest.approx(entry["params"] / 1e6, abs=1 if row.params == int(row.params) else 0.06)
    if row.flops:  # those of GhostNets are read off an axis
        assert row.flops == pytest.approx(entry.get("macs_plus_pool_reads", entry["macs"]) / 1e9, rel=0.025)
