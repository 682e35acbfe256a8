"""launch.labels: the same bytes however often it was interrupted, and views that training makes again exactly."""

import hashlib
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch import labels, train
from research.backbones import classify
from research.core import config as configs
from research.core.errors import UserError
from research.data import label_files, label_maps, labelled_views, pipeline, tape, transforms
from research.data.sources import source
from research.distill import stored

TEACHER = """
from configs import common

def get_config(arg=""):
    c = common.smoke(common.base(), size=8)
    c.experiment = "research.distill.vanilla_kd"
    c.data.split = "test"  # the smaller one
    c.augment.crop, c.augment.auto, c.augment.erase = "resized", "rand-m9-n2", 0.5
    c.mix.mixup, c.mix.cutmix = 0.5, 1.0
    small = dict(layers=(1, 1, 1), channels=(4, 4, 4), stem_width=4)
    c.students = common.arms(small=common.student("resnet8", options=small, label_loss="ce", loss="kd"))
    c.teacher = common.teacher("resnet8", options=small)
    c.teacher.weights = "random"
    return c
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "teacher.py"
    file.write_text(TEACHER)
    return file


def run(config, output, *words):
    return labels.main(["--config", str(config), "--output", str(output), "--batch", "32", *map(str, words)])


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """A folder of labels of two views, all classes, in three shards."""
    folder = tmp_path_factory.mktemp("labels") / "a"
    assert run(config, folder, "--views", 2, "--shards", 3) == 0
    return folder


def files(folder):
    return {f.name: hashlib.sha1(f.read_bytes()).hexdigest() for f in pathlib.Path(folder).rglob("*") if f.is_file()}


def opened(config, folder, *overrides):
    return train.open_data(configs.load(str(config), [f"--config.teacher.labels={folder}", *overrides]))


def test_again_there_is_nothing_to_do_and_other_options_are_refused(config, made, capsys):
    before = files(made)
    assert run(config, made, "--views", 2, "--shards", 3) == 0 and files(made) == before
    assert "2 views of 355 examples" in capsys.readouterr().out
    assert run(config, made, "--views", 3, "--shards", 3) == 1
    assert "holds labels made with other views (2, now 3): choose another folder" in capsys.readouterr().err
    assert run(config, made, "--views", 2, "--shards", 3, "--config.augment.flip=0.25") == 1
    assert "made with other augment" in capsys.readouterr().err
    assert files(made) == before


def test_killed_it_goes_on_and_ends_with_the_same_bytes(config, made, tmp_path):
    words = [sys.executable, "-m", "launch.labels", "--config", str(config), "--output", str(tmp_path / "b")]
    words += ["--batch", "32", "--views", "2", "--shards", "3"]
    with subprocess.Popen(words) as process:
        while not list((tmp_path / "b").glob("unfinished/labels-*.json")) and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="its labels are unfinished: run launch.labels again"):
        opened(config, tmp_path / "b")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "finished before" in done.stderr, done.stderr
    assert files(tmp_path / "b") == files(made)  # another process, so the same views and logits


def test_parts_make_the_same_files(config, made, tmp_path, capsys):
    words = ("--views", 2, "--shards", 3)
    assert run(config, tmp_path, *words, "--part", "1/2") == 0
    assert "this part is done, 2 shards are other parts'" in capsys.readouterr().out
    assert run(config, tmp_path, *words, "--part", "0/2") == 0
    assert files(tmp_path) == files(made)
    assert run(config, tmp_path, *words, "--part", "2/2") == 1
    assert "--part 2/2: write it as" in capsys.readouterr().err


def test_stored_logits_are_the_teachers_on_the_views_that_training_sees(config, made):
    data = opened(config, made)
    network = classify.network("resnet8", 10, 8, layers=(1, 1, 1), channels=(4, 4, 4), stem_width=4)
    with pipeline.train_batches(data.train, data.train_transform, batch_size=64, seed=3) as batches:
        batch = next(batches)
    assert sorted(batch) == ["image", "index", "known_logp", "known_lse", "label", "lam", "mask", "partner"]
    logits, _, _ = network.apply(*network.init(jax.random.PRNGKey(0)), classify.unit(batch["image"]))
    np.testing.assert_allclose(stored.known(batch, 10), logits, rtol=1e-4, atol=1e-5)
    told = labelled_views.fields(made)
    assert {key: (batch[key].dtype, batch[key].shape[1:]) for key in told} == told
    assert 0 < np.sum(batch["partner"] != batch["label"]) < 64 and 0 <= batch["lam"].min() < batch["lam"].max() <= 1


def test_batches_are_equal_with_worker_processes_and_every_view_is_used(config, made):
    data = opened(config, made)
    options = dict(batch_size=16, seed=1)
    with pipeline.train_batches(data.train, data.train_transform, **options) as threads:
        with pipeline.train_batches(data.train, data.train_transform, workers=2, **options) as workers:
            for _, a, b in zip(range(3), threads, workers, strict=False):
                assert all(np.array_equal(a[key], b[key]) for key in a)
    replayed = data.train_transform
    seen = {replayed(data.train[7], np.random.default_rng(seed))["image"].tobytes() for seed in range(20)}
    assert len(seen) == 2
    assert len(pickle.loads(pickle.dumps(replayed)).labels) == 355


def test_a_changed_config_is_refused_by_key(config, made):
    for change, message in {
        "augment.auto=": "augment.auto: , but .* was made with rand-m9-n2: set it so",
        "mix.prob=0.5": "mix.prob: 0.5, but .* was made with 1.0",
        "data.split=train": "data.path: digits train has 1442 examples, .* is of 355",
    }.items():
        with pytest.raises(UserError, match=message):
            opened(config, made, f"--config.{change}")


def copied(made, tmp_path):
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "labels-00001-of-00003.array_record"


def test_truncated_missing_and_damaged_shards_are_named(config, made, tmp_path):
    shard = copied(made, tmp_path)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"teacher.labels: .*00001.*array_record has \d+ of \d+ bytes: copy it again"):
        opened(config, tmp_path)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match=r"teacher.labels: .*00001.*\[\d+\] is damaged .*: copy it again"):
        opened(config, tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="00001.*is missing: copy it again"):
        opened(config, tmp_path)
    (tmp_path / "labels.json").write_text("{")
    with pytest.raises(UserError, match="labels.json is not readable .*: copy it again"):
        opened(config, tmp_path)
    with pytest.raises(FileNotFoundError, match="teacher.labels: no labels.json in .*; set it to a folder of launch"):
        opened(config, tmp_path / "elsewhere")


def test_a_warning_tells_of_other_pixels(config, made, caplog, monkeypatch):
    opened(config, made)
    assert not caplog.records
    monkeypatch.setattr("research.data.views.mixed", lambda image, partner, mix: image)  # as if Pillow had changed
    opened(config, made)
    assert "is not the image that the teacher saw" in caplog.text


def test_the_largest_classes_in_half_precision(config, tmp_path):
    assert run(config, tmp_path, "--top", 3, "--dtype", "float16", "--shards", 1) == 0
    found = label_files.Labels(tmp_path)[4].labels
    assert found["classes"].shape == (1, 3) and found["logp"].dtype == np.float16
    assert sorted(found["classes"][0]) == list(found["classes"][0])
    example = opened(config, tmp_path).train_transform(source("digits", split="test")[4], np.random.default_rng(0))
    assert example["known_classes"].dtype == np.int32 and example["known_logp"].dtype == np.float32


def test_maps_are_pooled_under_the_crop_of_the_view(config, tmp_path):
    assert run(config, tmp_path, "--form", "maps", "--size", 16, "--shards", 2) == 0
    data = opened(config, tmp_path, "--config.mix.mixup=0", "--config.mix.cutmix=0", "--config.augment.flip=1.0")
    example, rng = data.train[300], lambda: np.random.default_rng(5)
    result = data.train_transform(example, rng())
    plain = transforms.build(train=True, size=8, flip=1.0, auto="rand-m9-n2", erase=0.5)
    made, drawn = tape.record(plain, example, rng())
    np.testing.assert_array_equal(result["image"], made["image"])
    [found] = label_files.Labels(tmp_path)[300].labels
    assert found["scores"].shape == (4, 4, 5)
    box = label_maps.crop_box(plain, 8, 8, tape.Player(drawn))
    np.testing.assert_array_equal(result["known_logp"], label_maps.pool(found["scores"], found["classes"], box, 10))
    mixed = opened(config, tmp_path)
    with pipeline.train_batches(mixed.train, mixed.train_transform, batch_size=32, seed=0) as batches:
        batch = next(batches)
    np.testing.assert_allclose(np.exp(batch["known_logp"]).sum(-1), 1, rtol=1e-5)
    assert batch["lam"].min() < 1


def test_what_cannot_be_labelled_is_one_line(config, tmp_path, capsys):
    for words, message in [
        (["--top", 11], "--top 11: the data has 10 classes"),
        (["--views", 0], "--views 0: must be 1 to 65535"),
        (["--config.teacher.model="], "teacher.model: not set; labels need a teacher"),
        (["--config.teacher.weights="], "teacher.weights: not set"),
    ]:
        assert run(config, tmp_path / "a", *words) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
