"""`python -m research.backbones summary`: a network by its layers."""

import pytest

from research.backbones import __main__ as command
from research.backbones import summary


def printed(capsys, *words) -> dict[str, list[str]]:
    """First cell of each row -> the others."""
    assert command.main(["summary", *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip(" ─╶╴")]
    return {row[0]: row[1:] for row in rows}


def test_layers_add_up_to_the_published_counts(capsys):
    rows = printed(capsys, "resnet18", "--depth", "1")
    assert rows["layer"] == ["params", "MACs"]
    assert rows["conv1"] == ["9,408", "118,013,952"] and rows["fc"] == ["513,000", "512,000"]
    assert rows["total"] == ["11,689,512", "1,814,073,344"]


def test_binary_networks_have_their_operations(capsys):
    rows = printed(capsys, "bimlp_s", "--depth", "1")
    assert rows["total"] == ["15,840,412", "2,361,765,888", "2,241,835,008", "154,959,552"]
    assert rows["head"][2:] == ["0", "512,000"]


def test_a_size_of_ones_own():
    pixels = {side: sum(row.macs for row in summary.layers("resnet18", size=side)) for side in (32, 64)}
    head = 512_000
    assert pixels[64] - head == 4 * (pixels[32] - head)


@pytest.mark.parametrize("words, text", [(["resnet81"], "did you mean 'resnet8'?"), (["nothing"], "unknown model")])
def test_what_is_not_there_is_said(words, text, capsys):
    assert command.main(["summary", *words]) == 1
    assert text in capsys.readouterr().err
