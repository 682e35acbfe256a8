"""launch.train as a user meets it: runs, resumes, refuses with one line, and never touches what is there."""

import io
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from launch import compile as compile_ahead
from launch import evaluate, train
from research.core import config as configs
from research.core import writers

CONFIG = str(pathlib.Path(__file__).parent / "tiny.py")


def run(workdir, *options) -> int:
    return train.main(["--config", CONFIG, "--workdir", str(workdir), *options])


def refused(capsys, status: int) -> str:
    """The message of a refused run: the last line on stderr, without a traceback before it."""
    errors = capsys.readouterr().err
    assert status == 1
    assert "Traceback" not in errors
    return errors.strip().splitlines()[-1]


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def jpeg(seed: int = 0) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def archive(path: pathlib.Path, classes: int = 2, **extra: bytes) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as file:
        for split in ("train", "test"):
            for n in range(16 * classes):
                file.writestr(f"{split}/class{n % classes}/{n}.jpg", jpeg(n))
        for name, data in extra.items():
            file.writestr(name, data)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "tiny"
    assert run(folder) == 0
    return folder


def test_run_folder_is_complete(trained):
    names = {p.name for p in trained.iterdir()}
    assert {"config.json", "metrics.jsonl", "environment.json", "cost.json", "checkpoints", "weights"} <= names
    rows = writers.read_rows(trained)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert rows[-1]["kind"] == "done" and 0 <= rows[-1]["eval/small/top1"] <= 1
    assert {"train/loss", "train/grad_norm", "train/lr/small", "train/examples_per_s"} <= set(rows[0])


def test_finished_run_is_left_as_it_is(trained, capsys):
    before = writers.read_rows(trained)
    assert run(trained) == 0
    after = writers.read_rows(trained)
    drop = lambda rows: [{k: v for k, v in row.items() if k != "time"} for row in rows]
    assert drop(after) == drop(before)


def test_evaluate_run_and_weights_agree_with_training(trained, capsys):
    final = writers.read_rows(trained)[-1]
    assert evaluate.main(["--run", str(trained), "--json"]) == 0
    assert f'"small/top1": {final["eval/small/top1"]}' in capsys.readouterr().out


def test_other_config_in_the_folder_is_refused_with_the_difference(trained, capsys):
    before = files(trained)
    status = run(trained, "--config.optimizer.lr=0.5")
    errors = capsys.readouterr().err
    assert status == 1 and "optimizer.lr: 0.001 -> 0.5" in errors and "another --workdir" in errors
    assert files(trained) == before


def test_checkpoint_of_another_model_is_refused_by_name(trained, tmp_path, capsys):
    wider = "--config.students.small.options.embed_dim=12"
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "config.json").write_text(configs.to_json(configs.load(CONFIG, [wider])))
    before = files(tmp_path / "checkpoints")
    status = run(tmp_path, wider)
    errors = capsys.readouterr().err
    assert status == 1 and "holds another state" in errors and "params/small/model" in errors
    assert files(tmp_path / "checkpoints") == before


@pytest.mark.parametrize(
    "option, text",
    [
        ("--config.bath_size=8", "did you mean --config.batch_size?"),
        ("--config.data.path=/nowhere/x.zip --config.data.kind=zip", "data.path: nothing at /nowhere/x.zip"),
        ("--config.data.num_classes=7", "data.num_classes: 7 given, but digits"),
        ("--config.batch_size=12", "batch_size: 12 is not divisible by 8"),
        ("--config.students.small.model=mixer_s17_224", "did you mean 'mixer_s16_224'?"),
        ("--config.students.small.loss=kd", "students.small distils without a teacher"),
        ("--config.optimizer.name=lam", "unknown optimizer 'lam'"),
        ("--config.parallel.axes.fsdp=3", "parallel.axes"),
        ("--config.eval.split=val", "no 'val'"),
        ("--config.experiment=research.distill.vanila_kd", "there is no module 'research.distill.vanila_kd'"),
    ],
)
def test_bad_options_are_one_line_and_make_no_folder(option, text, tmp_path, capsys):
    folder = tmp_path / "run"
    assert text in refused(capsys, run(folder, *option.split()))
    assert not folder.exists()


def test_corrupt_jpeg_is_named_or_skipped(tmp_path, capsys):
    bad = archive(tmp_path / "bad.zip", **{"train/class0/broken.jpg": jpeg()[:200]})
    data = (f"--config.data.path={bad}", "--config.data.kind=zip")
    line = refused(capsys, run(tmp_path / "a", *data))
    assert "broken.jpg" in line and "data.on_corrupt=skip" in line
    assert run(tmp_path / "b", *data, "--config.data.on_corrupt=skip") == 0


def test_climbing_archive_is_refused(tmp_path, capsys):
    bad = archive(tmp_path / "bad.zip", **{"../outside.jpg": jpeg()})
    line = refused(capsys, run(tmp_path / "a", f"--config.data.path={bad}", "--config.data.kind=zip"))
    assert "../outside.jpg" in line
    assert not (tmp_path.parent / "outside.jpg").exists() and not (tmp_path / "a").exists()


def test_empty_dataset_is_refused(tmp_path, capsys):
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "test" / "cat").mkdir(parents=True)
    options = (f"--config.data.path={tmp_path / 'data'}", "--config.data.kind=folder")
    assert "data.path" in refused(capsys, run(tmp_path / "a", *options))


def test_nan_stops_with_the_step(tmp_path, capsys):
    line = refused(capsys, run(tmp_path, "--config.optimizer.lr=1e38", "--config.optimizer.name=sgd"))
    assert "at step" in line and "optimizer.lr" in line
    assert not any(row["kind"] == "done" for row in writers.read_rows(tmp_path))


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_objects_are_refused_and_never_run(tmp_path, capsys):
    """With or without torch installed: the message differs, the refusal does not."""
    trap, file = tmp_path / "ran", tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps({"state_dict": Bomb(trap)}))
    line = refused(capsys, run(tmp_path / "a", f"--config.students.small.weights={file}"))
    assert "weights.pth" in line
    assert not trap.exists()


def test_weights_of_another_network_are_refused(trained, tmp_path, capsys):
    weights = trained / "weights" / "small.safetensors"
    options = (f"--config.students.small.weights={weights}", "--config.students.small.options.num_blocks=2")
    line = refused(capsys, run(tmp_path / "a", *options))
    assert "small.safetensors" in line and "blocks" in line


def test_pretrained_weights_start_the_student(trained, tmp_path):
    weights = trained / "weights" / "small.safetensors"
    options = ("--config.steps=1", "--config.optimizer.lr=0.0", "--config.schedule.min_lr=0.0")
    assert run(tmp_path, *options, f"--config.students.small.weights={weights}") == 0
    final, started = writers.read_rows(trained)[-1], writers.read_rows(tmp_path)[-1]
    assert started["eval/small/loss"] == pytest.approx(final["eval/small/loss"], rel=1e-6)


def test_profile_writes_a_trace_and_a_summary(tmp_path, capsys):
    assert "has 4 steps, so there is no step 9" in refused(capsys, run(tmp_path / "a", "--profile=2:9"))
    assert "write FIRST:LAST" in refused(capsys, run(tmp_path / "a", "--profile=x"))
    assert not (tmp_path / "a").exists()
    assert run(tmp_path / "b", "--profile=2:3") == 0
    assert (tmp_path / "b" / "profile" / "summary.txt").read_text().startswith("2 steps,")


def test_compiled_steps_are_loaded_and_give_the_same_weights(trained, tmp_path, capsys):
    file = tmp_path / "tiny.exe"
    assert compile_ahead.main(["--config", CONFIG, "--topology", "cpu:8", "--save", str(file)]) == 0
    assert run(tmp_path / "run", "--executable", str(file)) == 0
    names = [folder / "weights" / "small.safetensors" for folder in (trained, tmp_path / "run")]
    assert names[0].read_bytes() == names[1].read_bytes()
    line = refused(capsys, run(tmp_path / "other", "--executable", str(file), "--config.optimizer.lr=0.5"))
    assert "config.optimizer.lr: 0.001 -> 0.5" in line
