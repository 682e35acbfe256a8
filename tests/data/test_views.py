"""Views that can be made again, mixed ones too, and ReLabel's pooling of the crops they show."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from research.core.errors import UserError
from research.data import label_maps, labelled_views, mixup, tape, transforms, views
from research.data.sources import Arrays
from tests.data.make import picture

PICTURES = np.stack([np.asarray(picture(seed)) for seed in range(6)])
SOURCE = Arrays(PICTURES, np.arange(6) % 3)
MIXINGS = {
    "none": views.Mixing(),
    "mixup": views.Mixing(mixup=0.4),
    "cutmix": views.Mixing(cutmix=1.0),
    "either": views.Mixing(mixup=0.4, cutmix=1.0, prob=0.7),
}


def views_of(source=SOURCE, mixing="either", **options):
    return views.Views(source, transforms.build(train=True, size=16, **options), MIXINGS[mixing])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 5), mixing=st.sampled_from(sorted(MIXINGS)))
def test_a_stored_view_is_made_again_to_the_last_bit(seed, index, mixing):
    made = views_of(mixing=mixing, auto="rand-m9-n2", erase=0.5)
    view, result = made.draw(SOURCE[index], np.random.default_rng(seed))
    kept = views.unpack(views.pack(view))
    assert kept == view
    again = made.replay(SOURCE[index], kept)
    np.testing.assert_array_equal(again["image"], result["image"])
    assert {key: again[key] for key in ("label", "index", "partner", "lam")} == {
        key: result[key] for key in ("label", "index", "partner", "lam")
    }
    assert views.matches(again, kept) and not views.matches({"image": again["image"] ^ np.uint8(1)}, kept)
    assert result["partner"] == (index % 3 if view.mix is None else view.mix.partner % 3)


def test_mixing_is_that_of_the_device_rounded():
    a, b = (np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8) for seed in (0, 1))
    mix = views.Mix(1, 0.3, None)
    on_device = mixup.mixup(a[None].astype(np.float32), 0.3, b[None].astype(np.float32))[0]
    np.testing.assert_allclose(views.mixed(a, b, mix), np.asarray(on_device), atol=0.5 + 1e-4)
    box = (2, 9, 0, 5)
    on_device = mixup.cutmix(a[None], box, b[None])[0]
    np.testing.assert_array_equal(views.mixed(a, b, views.Mix(1, 0.5, box)), np.asarray(on_device))


def test_mixing_is_drawn_from_its_distribution():
    drawn = [MIXINGS["either"].draw(np.random.default_rng(seed), 16, 6) for seed in range(3000)]
    mixed = [mix for mix in drawn if mix]
    cut = [mix for mix in mixed if mix.box]
    assert abs(len(mixed) / 3000 - 0.7) < 0.03 and abs(len(cut) / len(mixed) - 0.5) < 0.05
    assert {mix.partner for mix in mixed} == set(range(6))
    for mix in cut:
        top, bottom, left, right = mix.box
        assert mix.lam == pytest.approx(float(mixup.corrected_lam(mix.box, 16, 16)), abs=1e-6)
        assert 0 <= top <= bottom <= 16 and 0 <= left <= right <= 16
    lams = np.array([mix.lam for mix in mixed if not mix.box])
    assert abs(lams.mean() - 0.5) < 0.03 and abs(lams.var() - 1 / (4 * 1.8)) < 0.01  # Beta(0.4, 0.4)
    assert all(not mix for mix in (MIXINGS["none"].draw(np.random.default_rng(seed), 16, 6) for seed in range(9)))


class Damaged(Arrays):
    """Example 0 can be read, 1 to 3 cannot."""

    def image(self, index):
        return b"cut" if 1 <= index <= 3 else super().image(index)


def test_a_partner_that_cannot_be_read_gives_way_to_the_next():
    source = Damaged(PICTURES, np.arange(6) % 3)
    made = views_of(source, "mixup")
    drawn = [made.draw(source[0], np.random.default_rng(seed)) for seed in range(30)]
    assert {view.mix.partner for view, _ in drawn} == {0, 4, 5}
    for view, result in drawn[:5]:
        np.testing.assert_array_equal(made.replay(source[0], view)["image"], result["image"])


def test_bytes_of_something_else_are_no_view():
    view, _ = views_of(mixing="cutmix").draw(SOURCE[0], np.random.default_rng(0))
    data = views.pack(view)
    for wrong in (b"", data[:-1], data + b"x", data[:10]):
        with pytest.raises(ValueError):
            views.unpack(wrong)


def made_with(**changes):
    transform = transforms.build(train=True, size=16)
    return {
        "form": "crops",
        "data": labelled_views.identity(SOURCE),
        "augment": labelled_views.options(transform),
        "mix": labelled_views.options(MIXINGS["mixup"]),
    } | changes


@pytest.mark.parametrize(
    "source, options, mixing, message",
    [
        (SOURCE, dict(flip=0.2), "mixup", r"augment.flip: 0.2, but labels was made with 0.5: set it so, or run launch"),
        (SOURCE, dict(scale=(0.2, 1.0)), "mixup", r"augment.scale: \[0.2, 1.0\], but labels was made with \[0.08"),
        (SOURCE, {}, "either", r"mix.cutmix: 1.0, but labels was made with 0.0"),
        (Arrays(PICTURES[:5], np.arange(5) % 3), {}, "mixup", "data.path: arrays has 5 examples, labels is of 6"),
        (Arrays(PICTURES, np.arange(6) % 2), {}, "mixup", "data.path: arrays has 2 classes, labels is of 3"),
        (Arrays(PICTURES, np.arange(6)[::-1] % 3), {}, "mixup", "has other labels or class names than labels is of"),
    ],
)
def test_labels_made_otherwise_are_refused_by_key(source, options, mixing, message):
    transform = transforms.build(train=True, size=16, **options)
    with pytest.raises(UserError, match=message):
        labelled_views.check(made_with(), "labels", source, transform, MIXINGS[mixing])
    labelled_views.check(made_with(), "labels", SOURCE, transforms.build(train=True, size=16), MIXINGS["mixup"])


def test_maps_fit_any_crop_and_mixing():
    transform = transforms.build(train=True, size=16, flip=0.1)
    labelled_views.check(made_with(form="maps"), "labels", SOURCE, transform, MIXINGS["none"])


def roi_align(scores, x1, y1, x2, y2):
    """RoI-align of a dense (h, w, C) map into one bin, sample by sample (He et al. 2017; torchvision's conventions)."""
    height, width, _ = scores.shape
    roi_w, roi_h = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
    across, down = math.ceil(roi_w), math.ceil(roi_h)
    total = np.zeros(scores.shape[-1])
    for row in range(down):
        for column in range(across):
            y, x = y1 + (row + 0.5) * roi_h / down, x1 + (column + 0.5) * roi_w / across
            if y < -1 or y > height or x < -1 or x > width:
                continue
            y, x = max(y, 0.0), max(x, 0.0)
            y0, x0 = int(y), int(x)
            if y0 >= height - 1:
                y0 = y = height - 1
            if x0 >= width - 1:
                x0 = x = width - 1
            y9, x9 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            fy, fx = y - y0, x - x0
            total += (1 - fy) * (1 - fx) * scores[y0, x0] + (1 - fy) * fx * scores[y0, x9]
            total += fy * (1 - fx) * scores[y9, x0] + fy * fx * scores[y9, x9]
    return total / (across * down)


edges = st.tuples(st.floats(-0.4, 1.4), st.floats(-0.4, 1.4)).map(sorted)


@settings(max_examples=100, deadline=None)
@given(rows=edges, columns=edges, height=st.integers(1, 15), width=st.integers(1, 15), seed=st.integers(0, 99))
def test_pooling_is_roi_align_and_softmax(rows, columns, height, width, seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(height, width, 3)).astype(np.float32) * 4
    classes = np.argsort(rng.random((height, width, 8)))[..., :3].astype(np.uint16)
    dense = np.zeros((height, width, 8))
    np.put_along_axis(dense, classes.astype(int), scores.astype(float), -1)
    (top, bottom), (left, right) = rows, columns
    y1, y2 = (edge * height - 0.5 for edge in rows)
    x1, x2 = (edge * width - 0.5 for edge in columns)
    expected = log_softmax(roi_align(dense, x1, y1, x2, y2))
    found = label_maps.pool(scores, classes, label_maps.Box(top, left, bottom, right), 8)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(crop="resized"), dict(crop="pad", pad=4), dict(crop="none")])
@pytest.mark.parametrize("seed", range(5))
def test_the_box_is_the_part_of_the_image_that_the_transform_shows(options, seed):
    """The image tells rows by red and columns by green: their means in the crop are the middle of the box."""
    rows, columns = (np.linspace(50, 250, n, endpoint=False) + 100 / n for n in (120, 160))
    image = np.stack(np.broadcast_arrays(rows[:, None], columns[None, :], 0.0), -1).astype(np.uint8)
    transform = transforms.build(train=True, size=32, flip=0.0, interpolation="bilinear", **options)
    example = {"image": image, "label": 0, "index": 0}
    made, found = tape.record(transform, example, np.random.default_rng(seed))
    box = label_maps.crop_box(transform, 120, 160, tape.Player(found))
    inside = made["image"][..., :2][made["image"][..., 0] > 0]  # without the padding
    top, left, bottom, right = np.clip(box, 0, 1)
    middle = [50 + 200 * (top + bottom) / 2, 50 + 200 * (left + right) / 2]
    np.testing.assert_allclose(inside.mean(0), middle, atol=3)
