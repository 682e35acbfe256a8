"""Shards: the same examples as the source they were made from, on any number of hosts, and one line for every fault."""

import concurrent.futures
import itertools
import json
import pathlib
import pickle
import shutil

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from research.core.errors import deliberate
from research.data import records
from research.data.base import BadExample
from research.data.pipeline import eval_batches, train_batches
from research.data.shards import METADATA
from research.data.sources import source, splits
from research.data.transforms import build
from tests.data.make import tree
from tests.data.shard_maker import converted, numbered

PLAIN = build(train=False, size=8, crop=1.0)
images = st.one_of(st.binary(), hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=5)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with 23 training and 7 test examples in 3 shards each."""
    return converted(tmp_path_factory.mktemp("shards"), train=numbered(23), test=numbered(7))


def shard_of(folder, split="train", number=1, count=3):
    return pathlib.Path(folder) / f"{split}-{number:05d}-of-{count:05d}.array_record"


@hypothesis.given(images, st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**63 - 1))
@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
def test_records_come_back(image, label, index):
    data = records.pack(records.Record(image, label, index))
    assert records.pack(found := records.unpack(data)) == data
    assert type(found.image) is type(image) and np.array_equal(found.image, image)
    assert found[1:] == (label, index)


def test_record_bytes_are_as_documented():
    head = b"SR\x01\x00" + (7).to_bytes(4, "little") + (9).to_bytes(8, "little")
    assert records.pack(records.Record(b"file", 7, 9)) == head + b"file"
    pixels = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    shape = b"".join(n.to_bytes(4, "little") for n in (1, 2, 3))
    assert records.pack(records.Record(pixels, 7, 9)) == b"SR\x01\x01" + head[4:] + shape + bytes(range(6))


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "not a record"),
        (b"SR\x01", "not a record"),
        (b"XX" + bytes(20), "not a record"),
        (b"SR\x02\x00" + bytes(12), "version 2"),
        (b"SR\x01\x01" + bytes(12) + b"\x01" * 12 + b"x", "array"),
        (b"SR\x01\x01" + bytes(14), "array"),
    ],
)
def test_other_bytes_are_no_records(data, text):
    with pytest.raises(BadExample, match=text):
        records.unpack(data)


def test_examples_equal_those_of_the_folder_they_were_made_from(tmp_path):
    names = [
        f"{split}/{c}/{i}.jpg" for split, n in (("train", 4), ("val", 2)) for c in ("cat", "dog") for i in range(n)
    ]
    tree(tmp_path / "in", names)
    folder = {split: source("folder", str(tmp_path / "in"), split) for split in ("train", "val")}
    path = converted(tmp_path / "out", **folder)
    for split, one in folder.items():
        other = source(path=path, split=split, num_classes=2)
        assert other.class_names == one.class_names and np.array_equal(other.labels, one.labels)
        assert [other[i] for i in range(len(other))] == [one[i] for i in range(len(one))]
    assert splits("folder", str(tmp_path / "in")) == ["train", "val"]


def test_labels_are_known_without_the_images(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "a")
    for split in ("train", "test"):
        for number in range(3):
            file = shard_of(folder, split, number)
            file.write_bytes(bytes(file.stat().st_size))
    assert source(path=str(folder), split="test").labels.tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_where_names_file_and_record(made):
    opened = source(path=made, split="train")
    assert opened.where(0) == f"{shard_of(made, number=0)}[0]" and opened.where(22) == f"{shard_of(made, number=2)}[7]"
    assert [opened[i]["image"][0, 0, 0] for i in range(23)] == list(range(23))
    with pytest.raises(IndexError):
        opened[23]


def test_threads_share_a_source_and_processes_get_it_by_pickle(made):
    opened = source(path=made, split="train")
    opened[0]  # a reader is open
    for reader in (opened, pickle.loads(pickle.dumps(opened))):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda i, reader=reader: int(reader[i]["image"].max()), list(range(23)) * 4))
        assert got == list(range(23)) * 4


def test_workers_read_the_same_batches(made):
    opened = source(path=made, split="train")
    with train_batches(opened, PLAIN, batch_size=4, seed=1) as one:
        with train_batches(opened, PLAIN, batch_size=4, seed=1, workers=1) as other:
            for a, b in itertools.islice(zip(one, other, strict=True), 7):
                assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("split, length", [("train", 23), ("test", 7)])
def test_evaluation_is_exact_on_any_number_of_hosts(made, count, rows, split, length):
    hosts = []
    for process in range(count):
        opened = source(path=made, split=split)
        with eval_batches(opened, PLAIN, batch_size=rows * count, process_index=process, process_count=count) as found:
            hosts.append(list(found))
    assert len({len(host) for host in hosts}) == 1
    real = np.concatenate([b["image"][b["mask"] > 0][:, 0, 0, 0] for host in hosts for b in host])
    assert sorted(real) == list(range(length))


def test_hosts_open_only_the_shards_they_need(made):
    opened = source(path=made, split="train")
    for index in range(8, 15):
        opened[index]
    assert set(opened._readers) == {1}


def test_splits_in_folders_of_their_own(tmp_path):
    for split in ("train", "val"):
        converted(tmp_path / split, 2, **{split: numbered(5)})
    assert len(source("arrayrecord", str(tmp_path), "val")) == 5
    assert source("arrayrecord", str(tmp_path / "train")).name.endswith("train")


def test_changed_bit_is_one_bad_example(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "a")
    file = shard_of(folder)
    data = bytearray(file.read_bytes())
    data[data.index(bytes([10]) * 64) + 20] ^= 1
    file.write_bytes(data)
    opened = source(path=str(folder), split="train")
    assert int(opened[9]["image"].max()) == 9 and int(opened[11]["image"].max()) == 11
    with pytest.raises(BadExample, match="damaged"):
        opened[10]
    with eval_batches(opened, PLAIN, batch_size=23, on_corrupt="skip") as found:
        assert next(found)["mask"].sum() == 22


def break_it(folder: pathlib.Path, how: str) -> None:
    metadata = json.loads((folder / METADATA).read_text())
    file = shard_of(folder)
    if how == "missing shard":
        file.unlink()
    elif how == "cut shard":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "zeros":
        file.write_bytes(bytes(file.stat().st_size))
    elif how == "other count":
        metadata["splits"]["train"]["shards"] = [[8, size] for _, size in metadata["splits"]["train"]["shards"]]
        (folder / METADATA).write_text(json.dumps(metadata))
        np.save(folder / "train-labels.npy", np.zeros(24, np.int32))
    elif how == "no metadata":
        (folder / METADATA).unlink()
    elif how == "cut metadata":
        (folder / METADATA).write_text((folder / METADATA).read_text()[:50])
    elif how == "newer":
        (folder / METADATA).write_text(json.dumps(metadata | {"version": 9}))
    elif how == "no labels":
        (folder / "train-labels.npy").unlink()
    elif how == "cut labels":
        (folder / "train-labels.npy").write_bytes((folder / "train-labels.npy").read_bytes()[:100])
    elif how == "short labels":
        np.save(folder / "train-labels.npy", np.zeros(3, np.int32))
    elif how == "wide labels":
        np.save(folder / "train-labels.npy", np.full(23, 9, np.int32))
    elif how == "other labels":
        np.save(folder / "train-labels.npy", np.ones(23, np.int32))


@pytest.mark.parametrize(
    "how, texts",
    [
        ("missing shard", ["lacks 1 of the 3 shards of train (train-00001-of-00003.array_record)"]),
        ("cut shard", ["train-00001-of-00003.array_record has 131071 of 131072 bytes"]),
        ("zeros", ["train-00001-of-00003.array_record cannot be read"]),
        ("other count", ["train-00000-of-00003.array_record holds 7 records, shards.json says 8"]),
        ("no metadata", ["has shards but no shards.json", "launch.shards"]),
        ("cut metadata", ["shards.json is not readable"]),
        ("newer", ["shards.json", "version 9"]),
        ("no labels", ["train-labels.npy is missing"]),
        ("cut labels", ["train-labels.npy is damaged"]),
        ("short labels", ["train-labels.npy holds (3,) int32, the shards 23 examples"]),
        ("wide labels", ["train-labels.npy has labels outside the 5 classes"]),
        ("other labels", ["another label than the labels file"]),
    ],
)
def test_faults_name_the_file_and_the_fix(made, tmp_path, how, texts):
    folder = shutil.copytree(made, tmp_path / "a")
    break_it(folder, how)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        opened = source("arrayrecord", str(folder), "train")
        [opened[i] for i in range(len(opened))]
    message = str(error.value)
    assert message.startswith("data.path: ") and str(folder) in message, message
    assert all(text in message for text in texts), message
    assert "\n" not in message and deliberate(error.value)


def test_wrong_options_are_named(made, tmp_path):
    for options, text in [
        (dict(split="trian"), "did you mean train"),
        (dict(split="train", cash="x"), "data.options.cash.*cache"),
        (dict(split="train", num_classes=9), "data.num_classes=5"),
    ]:
        with pytest.raises(ValueError, match=text):
            source("arrayrecord", made, **options)
    with pytest.raises(FileNotFoundError, match="no shards.json in .*/nothing"):
        source("arrayrecord", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="data.path: a source of kind 'arrayrecord' needs one"):
        source("arrayrecord")
