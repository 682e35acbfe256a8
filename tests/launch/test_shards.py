"""launch.shards: the same bytes however often it was interrupted, and nothing half-written is ever taken for whole."""

import hashlib
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from launch import shards
from research.core.errors import UserError
from research.data import convert
from research.data.sources import source
from research.data.store import Store
from tests.data.make import jpeg, tree, zipped
from tests.data.shard_maker import converted, numbered


def files(folder):
    return {f.name: hashlib.sha1(f.read_bytes()).hexdigest() for f in pathlib.Path(folder).rglob("*") if f.is_file()}


def run(*words):
    return shards.main([*map(str, words), "--workers", "1"])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    tree(folder, [f"{split}/{c}/{i}.jpg" for split in ("train", "test") for c in ("cat", "dog") for i in range(5)])
    return folder


def test_folder_and_zip_become_the_same_examples(images, tmp_path, capsys):
    archive = zipped(tmp_path / "a.zip", {str(f.relative_to(images)): f.read_bytes() for f in images.rglob("*.jpg")})
    assert run("--from", "folder", images, "--to", tmp_path / "a", "--shards", 3) == 0
    assert "train: 10 images in 3 shards" in capsys.readouterr().out
    assert shards.main(["--from", str(archive), "--to", str(tmp_path / "b"), "--shards", "3", "--workers", "2"]) == 0
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.pop("shards.json") and b.pop("shards.json")  # they say where they come from
    assert a == b and len(a) == 8
    made, before = source(path=str(tmp_path / "a"), split="test"), source(path=str(images), split="test")
    assert [made[i] for i in range(10)] == [before[i] for i in range(10)]


def test_again_there_is_nothing_to_do_and_other_options_are_refused(tmp_path, capsys):
    words = ["--from", "digits", "--splits", "test", "--to", tmp_path / "a", "--shards", 2]
    assert run(*words) == 0
    before = files(tmp_path / "a")
    assert run(*words) == 0 and "nothing to do" in capsys.readouterr().out
    assert run(*words, "--quality", 90) == 1
    assert "holds data made with other quality (0, now 90): choose another folder" in capsys.readouterr().err
    assert files(tmp_path / "a") == before


def test_killed_conversion_goes_on_and_ends_with_the_same_bytes(tmp_path):
    words = [sys.executable, "-m", "launch.shards", "--from", "digits", "--shards", "20", "--workers", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    target = tmp_path / "a"
    process = subprocess.Popen([*words, "--to", str(target)], env=environment, start_new_session=True)
    while not list(target.glob("*.array_record")) and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    wait_for_end_of_group(process.pid)
    with pytest.raises(FileNotFoundError, match="launch.shards again"):
        source("arrayrecord", str(target), "train")
    done = subprocess.run([*words, "--to", str(target)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "were finished before" in done.stderr, done.stderr
    whole = converted(tmp_path / "b", 20, train=source("digits", split="train"), test=source("digits", split="test"))
    a, b = files(target), files(whole)
    a.pop("shards.json"), b.pop("shards.json")
    assert a == b and len(a) == 42


def wait_for_end_of_group(group):
    """Waits until the workers of a killed conversion have seen it end."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("workers outlive their parent")


def test_only_marked_shards_of_the_right_size_are_kept(tmp_path):
    opened, options = numbered(20), convert.Options()
    store, wanted = Store(tmp_path), convert.plan({"all": numbered(20)}, 4, options)
    assert convert.begin(store, wanted) == {"all": []}
    made = [convert.write_shard(opened, store, "all", k, 4, options, lambda _: None) for k in range(3)]
    whole = files(tmp_path)
    names = [f"all-{k:05d}-of-00004.array_record" for k in range(4)]
    (tmp_path / "unfinished" / f"{names[0]}.json").unlink()  # renamed, and killed before it was marked
    (tmp_path / names[1]).write_bytes(b"cut")
    (tmp_path / f".{names[3]}.123.partial").write_bytes(b"half")
    assert convert.begin(store, wanted) == {"all": [made[2]]}
    assert not list(tmp_path.glob(".*"))
    for number in (0, 1):
        convert.write_shard(opened, store, "all", number, 4, options, lambda _: None)
    assert files(tmp_path) == whole
    with pytest.raises(UserError, match="unfinished conversion made with other size .0, now 9."):
        convert.begin(store, convert.plan({"all": opened}, 4, convert.Options(size=9)))
    with pytest.raises(UserError, match="another source or number of shards"):
        convert.begin(store, convert.plan({"all": opened}, 5, options))


def test_shards_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "x.array_record").write_bytes(b"precious")
    assert run("--from", "digits", "--to", tmp_path) == 1
    assert list(files(tmp_path)) == ["x.array_record"]


def test_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written .*File too large.*; finished shards are kept"):
            convert.write_shard(numbered(200), Store(tmp_path), "all", 0, 1, convert.Options(), lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == {}


def test_difference_from_the_source_is_found_and_made_anew(tmp_path):
    store, options = Store(tmp_path), convert.Options()
    wanted = convert.plan({"all": numbered(9)}, 1, options)
    convert.begin(store, wanted)
    made = convert.write_shard(numbered(9), store, "all", 0, 1, options, lambda _: None)
    with pytest.raises(UserError, match=r"\[0\] differs from arrays\[0\]: run the same command again"):
        convert.verify(shifted(9), store, "all", [made], options)
    assert convert.begin(store, wanted) == {"all": []}


def shifted(count):
    moved = numbered(count)
    moved.images = moved.images + np.uint8(1)
    return moved


def test_damaged_images_are_named_or_left_out(tmp_path, capsys):
    tree(tmp_path / "in", ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"])
    (tmp_path / "in/a/2.jpg").write_bytes(jpeg()[:200])
    words = ["--from", tmp_path / "in", "--shards", 2]
    assert run(*words, "--to", tmp_path / "x") == 1
    error = capsys.readouterr().err
    assert "in/a/2.jpg: " in error and "--on-corrupt skip" in error and error.count("\n") == 1
    assert run(*words, "--to", tmp_path / "y", "--on-corrupt", "skip") == 0
    assert "3 images in 2 shards" in (out := capsys.readouterr().out) and "1 damaged ones left out" in out
    made = source(path=str(tmp_path / "y"))
    assert made.labels.tolist() == [0, 1, 1] and made[2]["image"] == (tmp_path / "in/b/2.jpg").read_bytes()
    assert "in/a/2.jpg" in json.loads((tmp_path / "y/shards.json").read_text())["splits"]["all"]["skipped"][0]
    for file in (tmp_path / "in").rglob("*.jpg"):
        file.write_bytes(b"")
    assert run(*words, "--to", tmp_path / "z", "--on-corrupt", "skip") == 1
    assert "none of the images of all can be read" in capsys.readouterr().err


def test_images_are_reduced_never_enlarged():
    big, small = jpeg(1, 60, 40), jpeg(2, 20, 10)
    reduced = Image.open(io.BytesIO(convert.prepare(big, convert.Options(size=20))))
    assert reduced.size == (30, 20) and reduced.format == "JPEG"
    assert convert.prepare(small, convert.Options(size=20)) == small
    assert convert.prepare(big, convert.Options()) == big
    lean, rich = (convert.prepare(big, convert.Options(quality=q)) for q in (30, 95))
    assert len(lean) < len(rich) and Image.open(io.BytesIO(lean)).size == (60, 40)
    pixels = np.asarray(Image.open(io.BytesIO(big)).convert("RGB").resize((30, 20), Image.Resampling.BICUBIC))
    assert np.abs(pixels.astype(int) - np.asarray(reduced)).mean() < 5


@pytest.mark.parametrize(
    "words, text",
    [
        (["--from", "zipp", "x"], "--from: no kind 'zipp'; did you mean zip?"),
        (["--from", "a", "b", "c"], "--from takes a kind and a path"),
        (["--from", "text", "x"], "--from text: shards hold images; runs read text from its files"),
        (["--from", "/no/such/place"], "nothing at /no/such/place"),
        (["--from", "digits", "--shards", "0"], "--shards 0: must be 1 to 99999"),
        (["--from", "digits", "--splits", "tran"], "did you mean train"),
        (["--from", "digits", "--to", "memory://x"], "shards are written to a local folder or gs://"),
    ],
)
def test_mistakes_are_one_line(words, text, tmp_path, capsys):
    assert run("--to", tmp_path / "a", *words) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1, error


def test_progress_tells_speed_and_time_left():
    stream = io.StringIO()
    progress = shards.Progress(100, stream, every=0)
    progress.show(25)
    line = stream.getvalue()
    assert line.startswith("25/100 images") and "images/s  ETA 00:00" in line
    quiet = shards.Progress(100, stream := io.StringIO(), every=60)
    quiet.show(25)
    assert stream.getvalue() == ""
