"""`python -m research.backbones`: the table of what exists, where it comes from and what is checked."""

import pathlib

import numpy as np

from research import backbones
from research.backbones import __main__ as table
from research.backbones import sources

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
PARTS = (
    "bottleneck",
    "dynamicconv",
    "ghostmodule",
    "llama",
    "load_",
    "moe_",
    "unit_",
    "ste_",
    "bce",
    "lamb",
    "schedules",
)


def test_shows_what_a_pattern_selects(capsys):
    assert table.main(["deit_tiny_d*", "resnet18"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "224" in line]
    assert rows == [
        ["resnet18", "resnet", "224", "11.69", "1.814", "1512.03385", "outputs"],
        ["deit_tiny_distilled_patch16_224", "vit", "224", "5.91", "1.261", "2012.12877", "outputs"],
    ]


def test_a_pattern_without_a_match_says_so(capsys):
    assert table.main(["vgg19_bn"]) == 1
    assert "no backbone is named vgg19_bn" in capsys.readouterr().err


def test_every_variant_has_a_paper_and_every_pattern_a_variant():
    names = backbones.variants()
    assert [name for name in names if not sources.paper(name)] == []
    first = {next(p for p in sources.PAPERS if sources.fnmatch.fnmatchcase(name, p)) for name in names}
    assert set(sources.PAPERS) == first
    assert [
        sources.paper(name) for name in ("resnet50", "resnet50d", "resnet8x4", "ghostnet_100", "ghostnet_300m")
    ] == [
        "1512.03385",
        "1812.01187",
        "1910.10699",
        "1911.11907",
        "2306.14525",
    ]


def test_every_listed_case_is_a_network_of_one_family():
    listed = [case for cases in sources.GOLDEN.values() for case in cases]
    assert len(set(listed)) == len(listed) and set(sources.GOLDEN) <= set(backbones.FAMILIES)
    for case in listed:
        with np.load(GOLDEN / f"{case}.npz") as found:
            assert any(key.startswith("w/") for key in found), case
    assert (sources.state("vit"), sources.state("cifar_vgg")) == ("outputs", "counts")


def test_every_golden_network_is_listed():
    folders = ("backbones", "vanillanet", "parameternet", "bimlp")
    files = [f"{folder}/{file.stem}" for folder in folders for file in sorted((GOLDEN / folder).glob("*.npz"))]
    whole = {name for name in files if not name.split("/")[1].startswith(PARTS)}
    assert whole <= {case for cases in sources.GOLDEN.values() for case in cases}
