"""What a seal finds: missing, cut off and changed files; large ones by their size alone."""

import os
import resource

import pytest

from research.core import seal


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "state" / "d").mkdir(parents=True)
    (tmp_path / "state" / "d" / "data").write_bytes(b"x" * 1000)
    (tmp_path / "record").write_text("{}")
    seal.write(tmp_path)
    return tmp_path


def test_intact_and_unsealed_folders_are_fine(folder):
    assert seal.damage(folder) is None
    (folder / "later").write_text("a file more")
    assert seal.damage(folder) is None
    (folder / seal.NAME).unlink()
    (folder / "record").unlink()
    assert seal.damage(folder) is None


def test_damage_is_named(folder):
    data = folder / "state" / "d" / "data"
    data.write_bytes(b"x" * 999 + b"y")
    assert seal.damage(folder) == "state/d/data has changed"
    data.write_bytes(b"x" * 10)
    assert seal.damage(folder) == "state/d/data has 10 bytes of 1000"
    data.unlink()
    assert seal.damage(folder) == "state/d/data is missing"
    (folder / seal.NAME).write_text("{")
    assert seal.damage(folder) == "seal.json is unreadable"


def test_large_files_are_not_read(tmp_path, monkeypatch):
    """A file of 200 GB with nothing in it is sealed at once; its size is checked."""
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 200 << 30)
    seal.write(tmp_path)
    assert seal.damage(tmp_path) is None
    os.truncate(large, 100 << 30)
    assert seal.damage(tmp_path) == f"large has {100 << 30} bytes of {200 << 30}"


def test_no_room_for_a_seal_leaves_the_folder_as_it_is(tmp_path, caplog):
    (tmp_path / "data").write_bytes(b"x" * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    try:
        seal.write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "is not sealed: " in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["data"] and seal.damage(tmp_path) is None
