"""launch.evaluate on checkpoints under official names: accuracy and probes of features, and what it refuses."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from launch import evaluate, evaluate_probe
from research import backbones
from research.backbones import linear_probe, probe
from research.core import config as configs
from research.data import sources, transforms
from research.port import checkpoint
from tests.backbones import drawn
from tests.data import make

CLASSES = ("n01440764", "n01443537", "n02102040", "n03000684")
SIDE = 16  # of the images that are probed: small ones
ONE = 1.01 / 90  # answer of the test images that rounding may turn


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-8 of 10 classes under official names, whose classifier always answers class 3."""
    file = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    image = np.zeros((1, 32, 32, 3), np.float32)
    variables = drawn.variables(backbones.create("resnet8", num_classes=10), image)
    variables["params"]["fc"]["kernel"] = np.zeros_like(variables["params"]["fc"]["kernel"])
    variables["params"]["fc"]["bias"] = np.eye(10, dtype=np.float32)[3]
    checkpoint.save_official(variables, "resnet8", file)
    return file


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """300 digits to learn from and 90 to be asked about; `few_` has nine, none of them a nine."""
    train, test = sources.digits("train"), sources.digits("test")
    arrays = {f"train_{key}": getattr(train, f"{key}s")[:300] for key in ("image", "label")}
    arrays |= {f"test_{key}": getattr(test, f"{key}s")[:90] for key in ("image", "label")}
    arrays |= {"few_image": train.images[:9], "few_label": train.labels[:9]}
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(file, **arrays)
    return file


@pytest.fixture(scope="module")
def features(weights, archive):
    """split -> (features, labels) of the archive, made without launch.evaluate, at SIDE pixels."""
    spec = backbones.input_spec("resnet8")
    transform = transforms.build(train=False, size=SIDE, crop=spec.crop)
    apply = jax.jit(backbones.create("resnet8", num_classes=0).apply)
    variables = checkpoint.load_official("resnet8", weights, num_classes=0)
    found = {}
    for split in ("train", "test"):
        source = sources.source(None, str(archive), split)
        images = np.stack([transform(source[i])["image"] for i in range(len(source))])
        images = (images / np.float32(255) - np.float32(spec.mean)) / np.float32(spec.std)
        pooled, endpoints = apply(variables, images)
        found[split] = np.asarray(pooled), source.labels
        found[f"{split}/stage1"] = np.mean(endpoints["stage1"], axis=(1, 2)), source.labels
    return found


def main(capsys, *words):
    """The JSON object of a successful command."""
    assert evaluate.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def probed(capsys, weights, archive, *words):
    place = ("--model", "resnet8", "--weights", weights, "--data", archive, "--split", "test", "--size", SIDE)
    return main(capsys, *place, *words)


def test_official_weights_on_the_digits(weights, capsys):
    words = ["--model", "resnet8", "--weights", weights, "--data", "digits", "--split", "test"]
    found = main(capsys, *words, "--batch-size", 100)
    # 355 digits in batches of 100: the padding of the last one does not count. 36 of them are a three.
    assert found["top1"] == pytest.approx(36 / 355)
    assert found["loss"] == pytest.approx(np.log(np.e + 9) - 36 / 355, rel=1e-5)


@pytest.mark.parametrize("crop", [None, 0.7])
def test_timm_weights_on_a_folder_of_image_files(crop, tmp_path, capsys):
    spec = backbones.input_spec("resnet10t")
    spec = spec._replace(crop=crop or spec.crop)
    model = backbones.create("resnet10t", num_classes=len(CLASSES))
    variables = drawn.variables(model, np.zeros((1, spec.size, spec.size, 3), np.float32))
    pictures = [make.picture(seed, width=220 - 9 * seed, height=150 + 11 * seed) for seed in range(10)]
    images = np.stack([_seen(picture, spec) for picture in pictures])
    logits = np.asarray(jax.jit(lambda v, x: model.apply(v, x)[0])(variables, images))
    # A classifier that prefers no class, so that the answers differ.
    variables["params"]["fc"]["bias"] = variables["params"]["fc"]["bias"] - logits.mean(0)
    logits = logits - logits.mean(0)
    weights = tmp_path / "resnet10t.safetensors"
    checkpoint.save_official(variables, "resnet10t", weights, dialect="timm")

    answers = logits.argmax(1)
    assert len(set(answers)) > 2
    labels = np.where(np.arange(10) < 7, answers, (answers + 1) % 4)  # the last three lie in a wrong folder
    for name in reversed(CLASSES):  # made in another order than that of their names
        (tmp_path / "imagenet" / "val" / name).mkdir(parents=True)
        (tmp_path / "imagenet" / "train" / name).mkdir(parents=True)
        make.picture().save(tmp_path / "imagenet" / "train" / name / "0.png")
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        picture.save(tmp_path / "imagenet" / "val" / CLASSES[label] / f"{number}.png")
    place = ("--weights", weights, "--data", tmp_path / "imagenet", "--split", "val", "--batch-size", 4)
    found = main(capsys, "--model", "resnet10t", *place, *(["--crop", crop] if crop else []))
    assert found["top1"] == pytest.approx(0.7)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(10), labels]
    assert found["loss"] == pytest.approx(loss.mean(), rel=1e-4)


def _seen(picture: Image.Image, spec) -> np.ndarray:
    """A picture as timm's evaluation shows it: shorter side to size / crop, central crop, normalised."""
    scale = int(spec.size / spec.crop) / min(picture.size)
    width, height = (int(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - spec.size) / 2), round((height - spec.size) / 2)
    pixels = np.asarray(picture.crop((left, top, left + spec.size, top + spec.size)), np.float32) / 255
    return (pixels - np.float32(spec.mean)) / np.float32(spec.std)


def test_knn(weights, archive, features, capsys):
    found = probed(capsys, weights, archive, "--protocol", "knn", "--k", "5,20", "--batch-size", 64)
    for k in (5, 20):
        weighted = _knn(features, k, weights=lambda d: np.exp((1 - d) / 0.07))
        assert found[f"k{k}/top1"] == pytest.approx(weighted, abs=ONE)
        assert found[f"k{k}/plain_top1"] == pytest.approx(_knn(features, k), abs=ONE)
    assert found["k5/top1"] > 0.5


def _knn(features, k, endpoint="", **options):
    classifier = KNeighborsClassifier(k, metric="cosine", **options).fit(*features[f"train{endpoint}"])
    return classifier.score(*features[f"test{endpoint}"])


def test_fewshot(weights, archive, features, capsys):
    words = ("--protocol", "fewshot", "--shots", "1,20", "--seeds", 2, "--l2", "64,1024")
    found = probed(capsys, weights, archive, *words)
    (values, labels), (asked, answers) = features["train"], features["test"]
    for shots in (1, 20):
        for l2 in (64, 1024):
            top1s = []
            for seed in range(2):
                places = probe.few(labels, shots, 10, seed)
                fit = probe.least_squares(values[places], labels[places], 10)
                top1s.append(np.mean(probe.regressed(fit, asked, l2).argmax(1) == answers))
                assert found[f"{shots}shot_l2={l2}/seed{seed}"] == pytest.approx(top1s[-1], abs=ONE)
            assert found[f"{shots}shot_l2={l2}/top1"] == pytest.approx(np.mean(top1s), abs=ONE)
    assert found["20shot_l2=64/top1"] > found["1shot_l2=64/top1"] + 0.1
    assert abs(found["1shot_l2=64/std"] - np.std(top1s, ddof=1)) < 0.1


def test_linear(weights, archive, features, capsys):
    found = probed(capsys, weights, archive, "--protocol", "linear", "--l2", 1)
    values, labels = features["train"]
    truth = LogisticRegression(C=1.0, solver="newton-cholesky").fit(values.astype(np.float64), labels)
    asked, answers = features["test"]
    assert found["top1"] == pytest.approx(truth.score(asked, answers), abs=ONE)
    loss = -np.mean(truth.predict_log_proba(asked)[np.arange(len(answers)), answers])
    assert found["loss"] == pytest.approx(loss, rel=1e-2)
    assert found["l2"] == 1 and "held_out_top1" not in found


def test_linear_searches_its_strength_on_held_out_examples(features):
    bank, asked = (evaluate_probe.Features(*features[split]) for split in ("train", "test"))
    found = evaluate_probe.linear(bank, asked, 10, evaluate_probe.Options("linear"))
    held = linear_probe.held_out(bank.labels)
    fit = linear_probe.logistic(*bank, 10, found["l2"], chosen=~held)
    top1 = np.mean(fit(bank.values[held]).argmax(1) == bank.labels[held])
    assert found["held_out_top1"] == pytest.approx(top1)
    worst = linear_probe.logistic(*bank, 10, 1e6, chosen=~held)
    assert top1 > np.mean(worst(bank.values[held]).argmax(1) == bank.labels[held])
    assert found["top1"] > 0.5 and found["l2"] in 10.0 ** (np.arange(97) / 8 - 6)


def test_another_endpoint_in_bfloat16(weights, archive, features, capsys):
    words = ("--protocol", "knn", "--k", 5, "--endpoint", "stage1")
    full = probed(capsys, weights, archive, *words)
    half = probed(capsys, weights, archive, *words, "--dtype", "bfloat16", "--batch-size", 90)
    assert full["k5/plain_top1"] == pytest.approx(_knn(features, 5, "/stage1"), abs=ONE)
    assert full["k5/plain_top1"] != pytest.approx(_knn(features, 5), abs=ONE)
    assert half["k5/top1"] == pytest.approx(full["k5/top1"], abs=0.04)


def test_the_arms_of_a_run(tmp_path, capsys):
    config = configs.load("tests/launch/tiny.py")
    student = config.students.small
    model = backbones.create(student.model, num_classes=10, **student.options)
    variables = drawn.variables(model, np.zeros((1, 8, 8, 3), np.float32))
    (tmp_path / "config.json").write_text(configs.to_json(config))
    words = ("--run", tmp_path, "--protocol", "knn", "--k", 3)
    assert evaluate.main([*map(str, words)]) == 1
    assert "weights/small.safetensors: not there" in capsys.readouterr().err
    (tmp_path / "weights").mkdir()
    checkpoint.save_variables(variables, tmp_path / "weights" / "small.safetensors")
    found = main(capsys, *words)
    assert set(found) == {"small/k3/top1", "small/k3/top5", "small/k3/plain_top1"}
    assert found["small/k3/top1"] > 0.5
    assert evaluate.main([*map(str, words)]) == 0
    assert "small/k3" in capsys.readouterr().out


MODEL = "--model resnet8 --weights {weights} --data {archive} --split test --size 16 "


@pytest.mark.parametrize(
    "words, text",
    [
        ("--model resnet8", "give --run, or --model with --weights and --data"),
        ("--run /nowhere", "no run here"),
        ("--run /nowhere --protocol knn", "no run here"),
        ("--run /nowhere --size 32", "--size: belongs to --model; give --config.eval.size="),
        ("--run /nowhere --model resnet8", "--run: evaluates the networks of a run"),
        ("--model resnet8 --weights /nowhere.safetensors --data digits --split test", "/nowhere.safetensors"),
        ("--modl resnet8", "did you mean --model?"),
        (MODEL + "--config.seed=1", "--config.seed=1: changes the config of a --run"),
        (MODEL + "--protocol kn", "--protocol: no 'kn'"),
        (MODEL + "--k 5", "--k: belongs to --protocol knn, not to top1"),
        (MODEL + "--crop 1.5", "--crop: 1.5 is not above 0 and at most 1"),
        (MODEL + "--protocol knn --k 5,x", "--k: '5,x' is not a list of numbers"),
        (MODEL + "--protocol fewshot --shots 0", "--shots: 0 is not above 0"),
        (MODEL + "--protocol linear --l2 1,2", "linear takes one strength"),
        (MODEL + "--protocol knn --k 301", "k: 301 neighbours of a bank of 300 examples"),
        (MODEL + "--protocol fewshot --shots 40", "shots: 40 of each class, but class"),
        (MODEL + "--protocol knn --train-split few", "has 9 classes, "),
        (MODEL + "--protocol knn --train-split tset", "did you mean test?"),
        (MODEL + "--protocol knn --train-split test", "is the data that is asked about"),
        (MODEL + "--protocol knn --endpoint stage9", "endpoint: no 'stage9'; did you mean stage"),
    ],
)
def test_refusals_are_one_line(words, text, weights, archive, capsys):
    assert evaluate.main(words.format(weights=weights, archive=archive).split()) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_a_class_without_an_example_is_refused_before_any_work(tmp_path, capsys):
    images, labels = sources.digits("test").images, sources.digits("test").labels
    kept = labels != 4
    arrays = {"train_image": images[kept][:50], "train_label": labels[kept][:50]}
    np.savez(tmp_path / "x.npz", **arrays, test_image=images[:60], test_label=labels[:60])
    place = ["--model", "resnet8", "--weights", "unread", "--data", str(tmp_path / "x.npz"), "--split", "test"]
    assert evaluate.main([*place, "--protocol", "knn"]) == 1
    assert "no example of class '4', which the test data has (1 such classes)" in capsys.readouterr().err
