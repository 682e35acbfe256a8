"""Shards in object stores: read in place from a bucket that answers on this machine, or copied to a bounded cache."""

import itertools
import json
import logging
import pathlib
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from research.core.errors import UserError
from research.data import cache as caches
from research.data.pipeline import eval_batches, train_batches
from research.data.shards import open_shards
from research.data.sources import source
from research.data.transforms import build
from tests.data import bucket
from tests.data.shard_maker import converted, numbered

pytest.importorskip("fsspec")
PLAIN = build(train=False, size=8, crop=1.0)
ROOT = pathlib.Path(__file__).parents[2]
SHARD = 131072  # bytes of each of the small shards


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("far"), train=numbered(23), test=numbered(7))


def values(opened):
    return [int(opened[i]["image"].max()) for i in range(len(opened))]


def copies(folder):
    return sorted(file.name[:11] for file in pathlib.Path(folder).rglob("*.array_record"))


def settled():
    """Waits until copying ahead has ended."""
    for thread in threading.enumerate():
        if thread.name == "shards":
            thread.join(30)


def test_other_stores_need_a_cache(made, tmp_path):
    with pytest.raises(UserError, match="data.options.cache: file://.* cannot be read in place"):
        source(path=f"file://{made}", split="train")
    with pytest.raises(UserError, match="nope://x cannot be reached: Protocol not known"):
        source(path="nope://x", split="train")


def test_cache_has_the_same_examples_and_copies_what_is_there_once(made, tmp_path, monkeypatch):
    opened = source(path=f"file://{made}", split="train", cache=str(tmp_path))
    assert copies(tmp_path) == [] and opened.concurrency == 1
    assert values(opened) == list(range(23))
    settled()
    assert copies(tmp_path) == ["train-00000", "train-00001", "train-00002"]
    monkeypatch.setattr(caches.Store, "get", None)  # nothing is copied again
    again = source(path=f"file://{made}", split="train", cache=str(tmp_path))
    assert values(again) == list(range(23)) and values(pickle.loads(pickle.dumps(opened))) == list(range(23))


def test_first_read_starts_copying_everything(made, tmp_path):
    opened = source(path=f"file://{made}", split="test", cache=str(tmp_path))
    opened[0]
    settled()
    assert len(copies(tmp_path)) == 3


def test_worker_processes_share_the_cache(made, tmp_path):
    far, near = (
        source(path=p, split="train", **o) for p, o in [(f"file://{made}", {"cache": str(tmp_path)}), (made, {})]
    )
    with train_batches(far, PLAIN, batch_size=4, seed=0, workers=2) as a:
        with train_batches(near, PLAIN, batch_size=4, seed=0) as b:
            for one, other in itertools.islice(zip(a, b, strict=True), 6):
                assert np.array_equal(one["image"], other["image"])
    assert len(copies(tmp_path)) == 3


def test_data_made_anew_are_copied_anew(tmp_path):
    for shift in (0, 1):
        at = tmp_path / "far"
        far = converted(tmp_path / f"{shift}", 1, test=numbered(3 + shift))
        at.unlink(missing_ok=True)
        at.symlink_to(far)
        assert len(values(source(path=f"file://{at}", split="test", cache=str(tmp_path / "cache")))) == 3 + shift
    assert len(copies(tmp_path / "cache")) == 2


def test_cache_too_small_is_refused_where_nothing_can_be_read_in_place(made, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="data.options.cache: the split has 0.000393 GB.*cache_gb allows 0.0002 GB"):
        source(path=f"file://{made}", split="train", cache=str(tmp_path), cache_gb=0.0002)
    monkeypatch.setattr(caches, "_SPARE", 1 << 60)  # as if the disk were full
    with pytest.raises(UserError, match="data.options.cache: .* room for .* make room"):
        source(path=f"file://{made}", split="train", cache=str(tmp_path))


def test_copy_of_another_size_is_not_kept(made, tmp_path, monkeypatch):
    monkeypatch.setattr(caches.Store, "get", lambda self, name, file: file.write_bytes(b"half"))
    opened = source(path=f"file://{made}", split="train", cache=str(tmp_path))
    with pytest.raises(UserError, match=f"train-00000-of-00003.array_record has not {SHARD} bytes"):
        opened[0]
    settled()
    assert copies(tmp_path) == []


def test_full_disk_is_told_and_leaves_nothing(made, tmp_path, monkeypatch):
    def full(self, name, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches.Store, "get", full)
    opened = source(path=f"file://{made}", split="train", cache=str(tmp_path))
    with pytest.raises(UserError, match="data.options.cache: .*not copied to .*No space left"):
        opened[0]
    settled()
    assert copies(tmp_path) == []


def test_cache_without_limit_room_keeps_the_first_shards_of_gs(made, tmp_path, monkeypatch, caplog):
    """What fits is copied, the rest is read in place; here the place is a disk, so that no server is needed."""
    monkeypatch.setattr("research.data.store.IN_PLACE", ("file",))
    monkeypatch.setattr(caches.Store, "where", lambda self, name: f"{self.root.removeprefix('file://')}/{name}")
    with caplog.at_level(logging.WARNING):
        opened = open_shards(f"file://{made}", "train", cache=str(tmp_path), cache_gb=2.5 * SHARD / 1e9)
    assert "the shards beyond are read in place" in caplog.text and opened.concurrency > 1
    assert values(opened) == list(range(23))
    settled()
    assert values(opened) == list(range(23)) and copies(tmp_path) == ["train-00000", "train-00001"]


# The bucket: array_record and gcsfs take its address from the environment as they start, so processes read it.

READ = """
    import json, sys
    import numpy as np
    from research.data import pipeline, sources, transforms

    path, options = sys.argv[1], json.loads(sys.argv[2])
    opened = sources.source(path=path, split="train", **options)
    plain = transforms.build(train=False, size=8, crop=1.0)
    with pipeline.eval_batches(opened, plain, batch_size=4, process_index=1, process_count=2) as batches:
        found = list(batches)
    print(json.dumps([int(b["image"][row].max()) for b in found for row in range(2) if b["mask"][row]]))
"""


def client(environment, *words):
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def far(made):
    pytest.importorskip("gcsfs")
    with bucket.serving() as server:
        for file in pathlib.Path(made).iterdir():
            server.objects[f"data/{file.name}"] = file.read_bytes()
        yield server


def test_gs_is_read_in_place_by_ranges_and_many_at_once(far, made, tmp_path):
    far.reads.clear()
    far.pause.set()
    found = json.loads(client(far.environment, "-c", textwrap.dedent(READ), "gs://test-bucket/data", "{}"))
    far.pause.clear()
    with eval_batches(source(path=made, split="train"), PLAIN, batch_size=4, process_index=1, process_count=2) as near:
        assert found == [int(i) for b in near for i in b["image"][b["mask"] > 0].max((1, 2, 3))]
    shards = [(name, asked) for name, asked in far.reads if name.endswith(".array_record")]
    assert {name[:16] for name, _ in shards} == {f"data/train-0000{n}" for n in range(3)}
    assert all(asked for _, asked in shards)  # no shard is read whole
    assert far.most >= 4


def test_gs_is_copied_to_the_cache(far, made, tmp_path):
    options = json.dumps({"cache": str(tmp_path)})
    found = json.loads(client(far.environment, "-c", textwrap.dedent(READ), "gs://test-bucket/data", options))
    assert found == [i for i in range(23) if i % 4 >= 2]
    for file in tmp_path.rglob("*.array_record"):
        assert file.read_bytes() == (pathlib.Path(made) / file.name).read_bytes()


def test_shards_are_written_to_gs_and_verified_there(far):
    words = ["-m", "launch.shards", "--from", "digits", "--splits", "test", "--shards", "2", "--workers", "1"]
    assert "test: 355 images in 2 shards" in client(far.environment, *words, "--to", "gs://test-bucket/digits")
    names = [name for name in far.objects if name.startswith("digits/")]
    assert sorted(names) == [
        "digits/shards.json",
        *(f"digits/test-0000{n}-of-00002.array_record" for n in range(2)),
        "digits/test-labels.npy",
    ]
