"""Text targets: every form of a user's file becomes the rows of the examples, and what does not fit is named."""

import cv2
import numpy as np
import pytest

from research.core.errors import UserError
from research.data import sources
from research.distill import text_targets

RNG = np.random.default_rng(0)
NAMES = ["cat/1.png", "cat/2.png", "dog/1.png"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in NAMES:
        path = root / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.zeros((4, 4, 3), np.uint8))
    return root


@pytest.fixture(scope="module")
def source(root):
    return sources.source("folder", str(root), split="train")


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def seen(targets):
    """What each example sees."""
    return targets.embeddings[targets.rows]


def test_rows_may_be_in_the_order_of_images_or_of_classes(source):
    images, classes = draw(3, 4), draw(2, 4)
    np.testing.assert_allclose(seen(text_targets.align(images, None, source)), unit(images), rtol=1e-6)
    by_class = text_targets.align(classes, None, source)
    np.testing.assert_allclose(seen(by_class), unit(classes)[[0, 0, 1]], rtol=1e-6)
    assert by_class.embeddings.shape == (2, 4) and by_class.rows.dtype == np.int32


def test_rows_may_be_keyed_by_class_or_path_in_any_order(source):
    rows = draw(3, 4)
    by_class = text_targets.align(rows, ["dog", "zebra", "cat"], source)
    np.testing.assert_allclose(seen(by_class), unit(rows)[[2, 2, 0]], rtol=1e-6)
    order = [2, 0, 1]
    for prefix in ("", "train/"):
        by_path = text_targets.align(rows, [prefix + NAMES[i] for i in order], source)
        np.testing.assert_allclose(seen(by_path)[order], unit(rows), rtol=1e-6)


def test_several_rows_of_a_key_become_their_mean_direction(source):
    rows = draw(3, 4)
    found = text_targets.align(rows * [[1], [50], [1]], ["cat", "cat", "dog"], source)
    np.testing.assert_allclose(seen(found)[0], unit(unit(rows[0]) + unit(rows[1])), rtol=1e-5)


def test_the_command_reads_every_form_and_training_reads_its_file(root, tmp_path, capsys):
    rows = draw(2, 4)
    np.save(tmp_path / "a.npy", rows)
    np.savez(tmp_path / "b.npz", embeddings=rows[::-1], keys=np.asarray(["dog", "cat"]))
    np.savez(tmp_path / "c.npz", cat=rows[0], dog=np.stack([rows[1], 2 * rows[1]]))
    for name in ("a.npy", "b.npz", "c.npz"):
        out = str(tmp_path / f"{name}.targets.npz")
        arguments = ["--embeddings", str(tmp_path / name), "--path", str(root), "--out", out]
        assert text_targets.main(arguments) == 0
        assert "3 examples" in capsys.readouterr().out
        found = text_targets.load(out, 3)
        np.testing.assert_allclose(seen(found), unit(rows)[[0, 0, 1]], atol=1e-3)
    with pytest.raises(UserError, match="targets of 3 examples, the data 4"):
        text_targets.load(out, 4)


def test_targets_of_other_data_are_named(source, tmp_path):
    with pytest.raises(UserError, match="5 embeddings for the 3 examples and 2 classes"):
        text_targets.align(draw(5, 4), None, source)
    with pytest.raises(UserError, match="1 of .* have no embedding; the first is 'dog'"):
        text_targets.align(draw(1, 4), ["cat"], source)
    with pytest.raises(UserError, match="2 of .* no embedding; the first is 'train/cat/2.png'"):
        text_targets.align(draw(1, 4), ["cat/1.png"], source)
    with pytest.raises(UserError, match="is no class of digits train, whose images have no paths"):
        text_targets.align(draw(1, 4), ["cat/1.png"], sources.digits())
    bad = draw(3, 4)
    bad[1] = 0
    with pytest.raises(UserError, match="1 rows have no direction .* the first is 1"):
        text_targets.align(bad, None, source)
    with pytest.raises(UserError, match="not floating"):
        text_targets.align(np.ones((3, 4), np.int32), None, source)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="not readable"):
        text_targets.read(str(tmp_path / "text.npz"))
    with pytest.raises(UserError, match="holds no text targets"):
        text_targets.load(str(tmp_path / "absent.npz"), 3)
    np.savez(tmp_path / "wrong.npz", embeddings=draw(3, 4), keys=np.asarray(["a"]))
    with pytest.raises(UserError, match="give one a row"):
        text_targets.read(str(tmp_path / "wrong.npz"))
    np.savez(tmp_path / "widths.npz", a=draw(3), b=draw(4))
    with pytest.raises(UserError, match="differ in width"):
        text_targets.read(str(tmp_path / "widths.npz"))


def test_made_up_targets_are_the_same_every_time():
    first, second = (text_targets.load("random", 7) for _ in range(2))
    np.testing.assert_array_equal(first.embeddings, second.embeddings)
    np.testing.assert_allclose(np.linalg.norm(first.embeddings, axis=1), 1, rtol=1e-6)
