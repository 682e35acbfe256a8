"""Run folders on a disk and in an object store: the store is an emulator of its HTTP interface, on this machine."""

import json
import os
import pathlib
import resource
import socket
import subprocess
import sys

import pytest

from research.core import storage
from research.core.errors import UserError

TINY = pathlib.Path(__file__).parents[1] / "launch" / "tiny.py"


def test_local_paths_stay_paths(tmp_path):
    assert storage.folder(tmp_path) == tmp_path and not storage.remote(tmp_path)
    assert isinstance(storage.folder("x/y"), pathlib.Path)


def test_unknown_schemes_and_missing_clients_are_named(monkeypatch):
    with pytest.raises(UserError, match="no store of kind ftp://; there are gs://, s3://"):
        storage.folder("ftp://host/run")
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://bucket/run: needs gcsfs: pip install 'stillroom\[gcs\]'"):
        storage.folder("gs://bucket/run")


def test_write_is_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "a.txt"
    storage.write(file, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            storage.write(file, "x" * 1000)
        assert error.value.filename == str(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "old" and storage.files(tmp_path) == [file]


def test_create_makes_a_file_once(tmp_path):
    assert storage.create(tmp_path / "a", "first") and not storage.create(tmp_path / "a", "second")
    assert storage.files(tmp_path) == [tmp_path / "a"] and (tmp_path / "a").read_text() == "first"


def test_log_on_disk_has_each_line_at_once(tmp_path):
    log = storage.Log(tmp_path / "log", ["a"])
    log.add("b")
    assert (tmp_path / "log").read_text() == "a\nb\n"


@pytest.fixture(scope="module")
def bucket():
    """Environment of processes for which gs://stillroom/ is a bucket of an emulator in memory."""
    pytest.importorskip("gcp_storage_emulator")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, str(pathlib.Path(__file__).with_name("gcs_server.py")), str(port), "stillroom"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout.readline() == b"ready\n"
    address = f"http://localhost:{port}"
    yield os.environ | {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GCE_METADATA_ROOT": "localhost:1",
    }
    server.communicate(b"", timeout=30)


def module(name: str, *options, env, status: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-m", name, *options], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr[-3000:]
    return done


def test_a_run_in_a_bucket_is_resumed_evaluated_and_reported(bucket, tmp_path):
    """Trains, stops and resumes in gs://; the same run on disk gives the same weights."""
    config = ["--config", str(TINY), "--config.save.every=0.05"]
    stopping = "import os, signal\nfrom launch import train\nfrom research.core import loop\n"
    stopping += "loop._agreed = lambda stop, step, every: step == 2\nraise SystemExit(train.main())\n"
    first = subprocess.run(
        [sys.executable, "-c", stopping, *config, "--workdir", "gs://stillroom/run"],
        env=bucket,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert first.returncode == 42, first.stderr[-3000:]
    again = module("launch.train", *config, "--workdir", "gs://stillroom/run", env=bucket)
    assert "resumed at step 2" in again.stderr
    module("launch.train", *config, "--workdir", str(tmp_path / "run"), env=bucket)
    show = "from research.core import storage; import sys; sys.stdout.buffer.write(storage.folder(sys.argv[1])"
    weights = subprocess.run(
        [sys.executable, "-c", f"{show}.read_bytes())", "gs://stillroom/run/weights/small.safetensors"],
        env=bucket,
        capture_output=True,
        check=True,
    )
    assert weights.stdout == (tmp_path / "run" / "weights" / "small.safetensors").read_bytes()
    found = json.loads(module("launch.evaluate", "--run", "gs://stillroom/run", "--json", env=bucket).stdout)
    assert 0 <= found["small/top1"] <= 1
    report = module("launch.report", "gs://stillroom/run", "--output", str(tmp_path / "report.html"), env=bucket)
    assert "top1" in report.stdout and (tmp_path / "report.html").exists()
    other = module("launch.train", *config, "--config.seed=1", "--workdir", "gs://stillroom/run", env=bucket, status=1)
    assert "seed: 0 -> 1" in other.stderr
