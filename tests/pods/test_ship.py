"""Shipping a commit: what is refused, and what lies on the other side."""

import tarfile

import pytest

from research.core.errors import UserError
from research.pods import job, ship
from tests.pods import make


@pytest.fixture
def root(tmp_path):
    return make.repository(tmp_path / "code")


def test_what_is_not_in_the_commit_is_refused_by_name(root):
    ship.check_clean(root)
    (root / "runs").mkdir()
    (root / "runs/ignored.txt").write_text("")
    ship.check_clean(root)
    (root / "configs/small.py").write_text("changed")
    (root / "new file.py").write_text("")
    with pytest.raises(UserError, match="configs/small.py, new file.py; commit them, or .*--dirty-ok"):
        ship.check_clean(root)
    make.git(root, "mv", "launch/train.py", "launch/other.py")
    assert sorted(ship.changed(root)) == ["configs/small.py", "launch/other.py", "new file.py"]


def test_revisions_become_hashes_and_unknown_ones_are_refused(root, tmp_path):
    full = make.git(root, "rev-parse", "HEAD")
    assert ship.commit(root) == ship.commit(root, "main") == ship.commit(root, full[:10]) == full
    for revision in ("nowhere", "f" * 40, "-h"):
        with pytest.raises(UserError, match="no such commit"):
            ship.commit(root, revision)
    with pytest.raises(UserError, match="not in a git repository"):
        ship.repository(tmp_path)
    assert ship.repository(root / "configs").samefile(root)


def test_a_config_is_named_from_the_root_and_must_be_shipped(root, monkeypatch, tmp_path):
    monkeypatch.chdir(root / "configs")
    for argument in ("small.py:a,b", "configs/small.py:a,b", "configs.small:a,b", f"{root}/configs/small.py:a,b"):
        assert ship.config(root, "HEAD", argument) == "configs/small.py:a,b"
    (root / "configs/new.py").write_text("")
    with pytest.raises(UserError, match="configs/new.py is not in commit HEAD"):
        ship.config(root, "HEAD", "new.py")
    (tmp_path / "far.py").write_text("")
    with pytest.raises(UserError, match="would not be shipped"):
        ship.config(root, "HEAD", str(tmp_path / "far.py"))


def test_the_code_is_unpacked_once_and_whole(root, tmp_path):
    found = make.job("cpu:1", str(tmp_path / "w x"), commit=ship.commit(root))
    (root / "configs/small.py").write_text("not committed")
    job.carry_out(ship.unpack(root, found))
    code = tmp_path / "w x/code" / found.commit
    assert "get_config" in (code / "configs/small.py").read_text()
    assert sorted(path.name for path in code.parent.iterdir()) == [found.commit, f"{found.commit}.tar.gz"]
    assert ship.unpack(root, found) == []


def test_a_tarball_is_uploaded_or_left_in_a_shared_folder(root, tmp_path):
    found = make.job("v5e:4x4", str(tmp_path / "w"), commit=ship.commit(root))
    job.carry_out(ship.upload(root, found))
    with tarfile.open(tmp_path / "w/code" / f"{found.commit}.tar.gz") as packed:
        assert "launch/train.py" in packed.getnames()
    remote = found._replace(workdir="gs://bucket/w", staging="here")
    last = ship.upload(root, remote)[-1].arguments
    assert last[:3] == ("gcloud", "storage", "cp")
    assert last[-2:] == (f"here/{found.commit}.tar.gz", f"gs://bucket/w/code/{found.commit}.tar.gz")


def test_a_work_folder_that_cannot_be_written_to_is_named(tmp_path):
    ship.probe(tmp_path / "new/folder")
    assert list((tmp_path / "new/folder").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/under: cannot be written to: .*not a directory"):
        ship.probe(tmp_path / "file/under")


def test_a_failing_command_says_which_and_why(tmp_path):
    with pytest.raises(UserError, match="(?s)ls failed with status 2: .*nowhere.*command: ls .*nowhere"):
        job.carry_out([job.command("ls", tmp_path / "nowhere")])
    with pytest.raises(UserError, match="no-such-program: not installed here"):
        job.carry_out([job.command("no-such-program", "x")])
    steps = [job.Write(str(tmp_path / "a/b"), "text"), job.command("cat", tmp_path / "a/b", submits=True)]
    assert job.carry_out([*steps, job.command("echo", "later")]) == "text"


@pytest.mark.parametrize(
    ("name", "near"),
    [("KD r50", "kd-r50"), ("50kd", "job-50kd"), ("a--b", "a-b"), ("x" * 40, "x" * 36), ("a_", "a")],
)
def test_names_that_an_engine_would_refuse_are_refused_with_the_nearest(name, near):
    with pytest.raises(UserError, match=f"try {near}$"):
        job.check_name(name)
    job.check_name(near)
