"""`python -m research.backbones`: the table of what exists."""

from research.backbones import __main__ as table


def test_shows_what_a_pattern_selects(capsys):
    assert table.main(["deit_tiny_d*", "resnet18"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "224" in line]
    assert rows == [
        ["resnet18", "resnet", "224", "11.69", "1.814"],
        ["deit_tiny_distilled_patch16_224", "vit", "224", "5.91", "1.261"],
    ]


def test_a_pattern_without_a_match_says_so(capsys):
    assert table.main(["vgg19_bn"]) == 1
    assert "no backbone is named vgg19_bn" in capsys.readouterr().err
