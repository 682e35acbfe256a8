"""Sources: the same examples from every container, and one clear line for every way a dataset can be wrong."""

import concurrent.futures
import pickle
import sys
import zipfile

import numpy as np
import pytest

from research.core.errors import deliberate
from research.data.base import BadExample
from research.data.sources import Arrays, source
from tests.data.make import encoded, jpeg, picture, tree, zipped

NAMES = [f"{split}/{name}/{i}.jpg" for split in ("train", "test") for name in ("dog", "cat") for i in range(3)]


def all_of(opened):
    return [opened[i] for i in range(len(opened))]


def test_digits_are_split_by_class_without_overlap():
    train, test, whole = (source("digits", split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(whole)) == (1442, 355, 1797)
    assert train.num_classes == 10 and train.class_names == tuple("0123456789")
    count = lambda s: np.bincount(s.labels, minlength=10)
    np.testing.assert_array_equal(count(train) + count(test), count(whole))
    assert np.all(np.abs(count(test) / count(whole) - 0.2) < 0.005)
    images = {s.name: {(s[i]["image"].tobytes(), s[i]["label"]) for i in range(len(s))} for s in (train, test, whole)}
    assert images["digits train"] | images["digits test"] == images["digits all"]
    assert not images["digits train"] & images["digits test"]


def test_digits_are_the_library_s():
    from sklearn.datasets import load_digits

    whole, data = source("digits", split="all"), load_digits()
    example = whole[1000]
    assert example["image"].dtype == np.uint8 and example["image"].shape == (8, 8, 3)
    assert example["label"] == data.target[1000] and example["index"] == 1000
    np.testing.assert_allclose(example["image"][..., 1] / 255 * 16, data.images[1000], atol=0.04)


def test_folder_labels_are_sorted_class_names(tmp_path):
    files = tree(tmp_path, NAMES)
    opened = source("folder", str(tmp_path), "train", num_classes=2)
    assert opened.class_names == ("cat", "dog") and list(opened.labels) == [0, 0, 0, 1, 1, 1]
    assert [opened[i]["image"] for i in range(6)] == [
        files[f"train/{c}/{i}.jpg"] for c in ("cat", "dog") for i in range(3)
    ]
    assert opened.where(4) == f"{tmp_path}/train/dog/1.jpg"
    with pytest.raises(IndexError):
        opened[6]


def test_folder_without_splits(tmp_path):
    tree(tmp_path, ["b/1.jpg", "a/2.png", "a/deep/er.JPEG", "a/notes.txt", ".hidden/x.jpg", "b/._1.jpg"])
    opened = source(path=str(tmp_path))
    assert opened.class_names == ("a", "b") and list(opened.labels) == [0, 0, 1]


def test_class_missing_from_one_split_does_not_shift_labels(tmp_path):
    tree(tmp_path, ["train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/2.jpg"])
    opened = source(path=str(tmp_path), split="val")
    assert opened.num_classes == 3 and opened[0]["label"] == 2


def test_wrapping_folder_and_imagenet_s_flat_names(tmp_path):
    tree(tmp_path / "a", ["cifar10/train/dog/1.jpg", "cifar10/train/cat/1.jpg", "cifar10/test/dog/1.jpg"])
    assert source(path=str(tmp_path / "a"), split="train").class_names == ("cat", "dog")
    tree(tmp_path / "b", ["cifar10/dog/1.jpg", "cifar10/cat/1.jpg"])
    assert source(path=str(tmp_path / "b")).class_names == ("cat", "dog")
    tree(tmp_path / "c", ["n01440764_36.JPEG", "n01443537_2.JPEG", "n01440764_18.JPEG"])
    assert list(source(path=str(tmp_path / "c")).labels) == [0, 0, 1]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_equals_folder(tmp_path, compression):
    files = tree(tmp_path / "folder", NAMES)
    path = zipped(tmp_path / "a.zip", dict(reversed(files.items())), compression)
    folder, archive = source(path=str(tmp_path / "folder"), split="test"), source(path=str(path), split="test")
    assert all_of(folder) == all_of(archive) and folder.class_names == archive.class_names
    assert archive.where(0) == f"{path}/test/cat/0.jpg"


def test_zip_is_read_by_many_threads_and_survives_pickling(tmp_path):
    files = {f"c{i % 5}/{i:03d}.jpg": jpeg(i) for i in range(60)}
    opened = source(path=str(zipped(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)))
    expected = all_of(opened)
    for reader in (opened, pickle.loads(pickle.dumps(opened))):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            got = list(pool.map(reader.__getitem__, list(range(60)) * 5))
        assert got == expected * 5


def test_zip_entry_damaged_by_a_bit_is_found(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    data = bytearray(path.read_bytes())
    data[data.index(jpeg(2)) + 300] ^= 1
    path.write_bytes(bytes(data))
    opened = source(path=str(path))
    assert opened[0]["image"] == jpeg(1)
    with pytest.raises(BadExample, match="checksum"):
        opened[1]


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "C:/evil.jpg", "a\\..\\..\\evil.txt"]
)
def test_zip_entry_that_climbs_out_is_refused(tmp_path, name):
    path = zipped(tmp_path / "a.zip", {"a/1.jpg": jpeg(), name: b"x"})
    with pytest.raises(ValueError, match="climbs out") as error:
        source(path=str(path))
    assert repr(name) in str(error.value) and "a.zip" in str(error.value) and "\n" not in str(error.value)


def test_arrays_and_npz(tmp_path):
    images, labels = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4), np.array([0, 2, 1, 0, 2])
    opened = source("arrays", images=images, labels=labels)
    assert opened.num_classes == 3 and opened[1]["image"].shape == (4, 4, 1) and opened[1]["label"] == 2
    assert source("arrays", images=images, labels=labels, num_classes=7).num_classes == 7
    np.savez(
        tmp_path / "a.npz", train_images=images, train_labels=labels[:, None], test_images=images, test_labels=labels
    )
    again = source(path=str(tmp_path / "a.npz"), split="train")
    np.testing.assert_array_equal(again[3]["image"], opened[3]["image"])
    np.savez(tmp_path / "b.npz", image=images, label=labels, class_names=np.array(["x", "y", "z"]))
    assert source(path=str(tmp_path / "b.npz")).class_names == ("x", "y", "z")


def prepared(root):
    """A prepared TFDS dataset of four images, written record by record."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    label = tfds.features.ClassLabel(names=["cat", "dog"])
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(None, None, 3)), "label": label})
    name = tfds.core.ShardedFileTemplate(
        dataset_name="tiny", split="train", filetype_suffix="array_record", data_dir=str(root)
    )
    writer = ArrayRecordWriter(f"{root}/tiny-train.array_record-00000-of-00001", "group_size:1")
    for i in range(4):
        writer.write(features.serialize_example({"image": jpeg(i), "label": i % 2}))
    writer.close()
    split = tfds.core.SplitInfo(name="train", shard_lengths=[4], num_bytes=1, filename_template=name)
    tfds.folder_dataset.write_metadata(
        data_dir=str(root), features=features, split_infos=[split], filename_template=name.template, check_data=False
    )
    return str(root)


def test_tfds_without_tensorflow(tmp_path):
    path = prepared(tmp_path)
    opened = source("tfds", path, "train", num_classes=2)
    assert opened.class_names == ("cat", "dog") and len(opened) == 4
    assert {(e["image"], e["label"]) for e in all_of(opened)} == {(jpeg(i), i % 2) for i in range(4)}
    assert pickle.loads(pickle.dumps(opened))[2] == opened[2]
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="no 'test'.*'train'"):
        source("tfds", path, "test")


def test_fractals_depend_on_index_alone():
    opened = source("fractals", num_classes=5, size=48, instances=None)
    assert len(opened) == 2**31 - 1 and opened.num_classes == 5
    examples = [opened[i] for i in (7, 12, 2**31 - 2)]
    assert [e["label"] for e in examples] == [2, 2, (2**31 - 2) % 5]
    assert all(e["image"].shape == (48, 48, 3) and e["image"].dtype == np.uint8 for e in examples)
    again = source("fractals", num_classes=5, size=48)
    np.testing.assert_array_equal(again[7]["image"], examples[0]["image"])
    assert (examples[0]["image"] != examples[1]["image"]).any()
    for options in (dict(seed=1), dict(split="test")):
        other = source("fractals", num_classes=5, size=48, **options)
        assert (other[7]["image"] != examples[0]["image"]).any() and other[7]["label"] == 2


def test_fractals_of_a_class_are_alike_and_fill_the_canvas():
    opened = source("fractals", num_classes=12, size=32)
    at = lambda label, instance: opened[label + 12 * instance]["image"][..., 0].astype(float).ravel() / 255
    filled = np.array([at(label, 0).mean() for label in range(12)])
    assert np.all(filled > 0.05) and np.all(filled < 0.95)

    def likeness(a, b):  # best over flips, which instances are free to differ by
        flips = [b.reshape(32, 32)[::v, ::h].ravel() for v in (1, -1) for h in (1, -1)]
        return max(np.corrcoef(a, f)[0, 1] for f in flips)

    same = [likeness(at(label, 0), at(label, 1)) for label in range(12)]
    different = [likeness(at(label, 0), at((label + 5) % 12, 1)) for label in range(12)]
    assert np.mean(same) > np.mean(different) + 0.15


def test_colour_fractals_are_of_one_hue():
    image = source("fractals", num_classes=3, size=32, color=True)[4]["image"]
    assert len({tuple(pixel) for pixel in image.reshape(-1, 3)} - {(0, 0, 0)}) == 1


def make_wrong(kind, path):
    """Builds the dataset of an error case; returns the path to open."""
    if kind == "no images":
        (path / "a").mkdir()
        (path / "a" / "readme.txt").write_text("none here")
    elif kind == "loose":
        tree(path, ["a/1.jpg", "2.jpg"])
    elif kind == "classes":
        tree(path, ["a/1.jpg", "b/2.jpg"])
    elif kind == "splits":
        tree(path, NAMES)
    elif kind == "text":
        (path := path / "a.txt").write_text("hello")
    elif kind == "no zip":
        (path := path / "a.zip").write_text("hello")
    elif kind == "cut zip":
        whole = zipped(path / "b.zip", {"a/1.jpg": jpeg()}).read_bytes()
        (path := path / "a.zip").write_bytes(whole[: len(whole) // 2])
    elif kind == "empty zip":
        path = zipped(path / "a.zip", {})
    elif kind == "objects":
        np.savez(path / "a.npz", image=np.array([{"a": 1}], dtype=object), label=np.zeros(1, int))
        path = path / "a.npz"
    elif kind == "no labels":
        np.savez(path / "a.npz", image=np.zeros((1, 2, 2), np.uint8))
        path = path / "a.npz"
    return str(path)


@pytest.mark.parametrize(
    "build, options, texts",
    [
        ("classes", dict(path="/no/such/place"), ["data.path", "/no/such/place"]),
        ("classes", dict(kind="zip", path=None), ["data.path", "zip"]),
        ("classes", dict(kind="digts", path=None), ["data.kind", "digts", "did you mean digits"]),
        ("classes", dict(path=None), ["data.kind", "digits", "data.path"]),
        ("classes", dict(num_classes=3), ["data.num_classes: 3", "has 2 (a, b", "data.num_classes=2"]),
        ("classes", dict(split="train"), ["'train'", "no splits", "a, b"]),
        ("classes", dict(size=3), ["data.options.size", "'folder'"]),
        ("splits", dict(), ["'test', 'train'", "data.split", "not set"]),
        ("splits", dict(split="val"), ["'val'", "'test', 'train'"]),
        ("splits", dict(split="trian"), ["did you mean train"]),
        ("no images", dict(), ["data.path", "holds no images", ".jpg"]),
        ("loose", dict(), ["data.path", "2.jpg", "class folder"]),
        ("text", dict(), ["data.path", "a.txt", "data.kind"]),
        ("no zip", dict(), ["data.path", "a.zip", "not a readable zip"]),
        ("cut zip", dict(), ["data.path", "a.zip", "not a readable zip"]),
        ("empty zip", dict(), ["data.path", "a.zip", "holds no images"]),
        ("objects", dict(), ["data.path", "a.npz", "plain arrays"]),
        ("no labels", dict(), ["data.path", "a.npz", "'label'"]),
        ("classes", dict(kind="tfds", path=None), ["data.options.tfds_name"]),
        ("classes", dict(kind="tfds", tfds_name="cifar10"), ["cifar10"]),
        ("classes", dict(kind="digits", path=None, split="dev"), ["'dev'", "'train', 'test', 'all'"]),
        ("classes", dict(kind="digits", path=None, split="test", num_classes=11), ["data.num_classes: 11", "=10"]),
        ("classes", dict(kind="digits", split="test"), ["data.path", "'digits' reads no file", "folder"]),
        ("classes", dict(kind="fractals", path=None, split="val"), ["eval.split", "'train', 'test'"]),
        ("classes", dict(kind="fractals", path=None, instances=0), ["instances=0"]),
    ],
)
def test_errors_name_the_key_and_the_fix(tmp_path, build, options, texts):
    given = {"path": make_wrong(build, tmp_path), **options}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        source(**given)
    message = str(error.value)
    assert all(text in message for text in texts), message
    assert "\n" not in message and deliberate(error.value)


@pytest.mark.parametrize(
    "images, labels, text",
    [
        (np.zeros((2, 4, 4), np.float32), [0, 1], "float32"),
        (np.zeros((2, 4, 4, 2), np.uint8), [0, 1], "1 or 3"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1, 2], "whole labels"),
        (np.zeros((2, 4, 4), np.uint8), [0.0, 1.0], "whole labels"),
        (np.zeros((2, 4, 4), np.uint8), [-1, 1], "-1"),
    ],
)
def test_wrong_arrays_are_refused(images, labels, text):
    with pytest.raises(ValueError, match=text):
        Arrays(images, labels)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="data.path: arrays holds no examples"):
        source("arrays", images=np.zeros((0, 4, 4), np.uint8), labels=np.zeros(0, int))


def test_png_and_jpeg_live_together(tmp_path):
    tree(tmp_path, ["a/1.jpg"])
    (tmp_path / "a" / "2.png").write_bytes(encoded(picture(3), "PNG"))
    assert [e["image"][:4] for e in all_of(source(path=str(tmp_path)))] == [b"\xff\xd8\xff\xe0", b"\x89PNG"]
