"""The scale study's table: from kept points, resumable, with what was not run."""

import json

import pytest

from launch import scale
from research.core.errors import UserError

STUDY = scale.Study("Tiny", "tests/launch/tiny.py", ("--config.eval.batch_size=16",))
LARGE = scale.Study(
    "Large", "tests/launch/tiny.py", (*STUDY.overrides, "--config.students.small.options.embed_dim=4096")
)


def test_points_are_compiled_once_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "STUDIES", (STUDY, LARGE))
    page = tmp_path / "README.md"
    page.write_text(f"before\n{scale.BEGIN}\nold\n{scale.END}\nafter\n")
    arguments = ["--cache", str(tmp_path / "cache"), "--topologies", "cpu:2", "--output", str(page)]
    monkeypatch.delenv("XLA_FLAGS")  # the processes make two devices, not eight
    assert scale.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| Tiny", "| Large"))]
    assert len(rows) == 2 and "| `cpu:2` | 2 | 8 |" in rows[0]
    assert "OUT OF MEMORY" in rows[1] and "fsdp=2" in rows[1]
    monkeypatch.setattr(scale, "run_point", lambda *_: pytest.fail("compiled again"))
    assert scale.main(arguments) == 0 and page.read_text() == text


def test_points_not_run_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "run_point", lambda *_: pytest.fail("started after the time was up"))
    assert scale.main(["--cache", str(tmp_path), "--minutes", "1e-9"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "not run" in line]
    assert len(rows) == len(scale.STUDIES) * len(scale.TOPOLOGIES)
    assert all(line.count("|") == rows[0].count("|") == 15 for line in rows)


def test_a_point_of_other_overrides_is_not_taken(tmp_path):
    scale.point_file(tmp_path, STUDY, "cpu:2").write_text(json.dumps({"study": ["Tiny", STUDY.config, []]}))
    assert scale.cached(tmp_path, STUDY, "cpu:2") is None


def test_mistakes(tmp_path, capsys):
    assert scale.main(["--only", "ViT-S", "--cache", str(tmp_path)]) == 1
    assert "no study 'ViT-S'; did you mean ViT-S/16?" in capsys.readouterr().err
    page = tmp_path / "README.md"
    page.write_text("no marks")
    with pytest.raises(UserError, match="has no lines"):
        scale.write(page, "table")
