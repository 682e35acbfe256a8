"""Augmentation: timm's option strings and magnitudes, operations against hand-written pixels, and drawn frequencies."""

import math

import numpy as np
import pytest
from PIL import Image

from research.data import augment
from research.data.augment import OPERATIONS, RandAugment, parse_rand_augment, strength
from tests.data.make import picture


@pytest.mark.parametrize(
    "text, expected",
    [
        ("rand", RandAugment(10, 2)),
        ("rand-m7-mstd0.5", RandAugment(7, 2, 0.5)),
        ("rand-m9-mstd0.5-inc1", RandAugment(9, 2, 0.5, increasing=True)),
        ("rand-n3-m9", RandAugment(9, 3)),
        ("rand-m15-mmax20-n4", RandAugment(15, 4, top=20)),
        ("rand-mstd1-w0", RandAugment(10, 2, 1.0, weighted=True)),
        ("rand-m9-mstd101", RandAugment(9, 2, math.inf)),
        ("rand-m9-mstd100", RandAugment(9, 2, 100.0)),
        ("rand-m0-n1", RandAugment(0, 1)),
    ],
)
def test_option_strings(text, expected):
    assert parse_rand_augment(text) == expected


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "rand"),
        ("m9", "'rand'"),
        ("augmix-m3", "'rand'"),
        ("rand-x3", "'x3'"),
        ("rand-m", "'m'"),
        ("rand-9", "'9'"),
        ("rand-m9-", "''"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-m-1", "'m'"),
        ("rand-mstdinf", "'mstdinf'"),
        ("rand-mstd.5", "'mstd.5'"),
        ("rand-mstd0.5.5", "'mstd0.5.5'"),
        ("rand-m9-p0.5", "'p0.5'"),
        ("rand-m9-n2-m8", "'m8' is given twice"),
        ("rand-m9-inc0", "inc0"),
        ("rand-m9-inc2", "inc is 1"),
        ("rand-w1", "w is 0"),
        ("rand-n0", "at least 1"),
        ("rand-mmax0", "at least 1"),
        ("Rand-m9", "'rand'"),
    ],
)
def test_unknown_parts_are_errors(text, part):
    with pytest.raises(ValueError, match="augment.auto") as error:
        parse_rand_augment(text)
    assert part in str(error.value) and repr(text) in str(error.value)


# The table below is worked out by hand from timm 0.6.5's level functions: (operation, magnitude, plain, increasing).
TABLE = [
    ("AutoContrast", 7, None, None),
    ("Rotate", 7, 21.0, 21.0),
    ("Rotate", 10, 30.0, 30.0),
    ("Posterize", 0, 0, 4),
    ("Posterize", 7, 2, 2),
    ("Posterize", 9, 3, 1),
    ("Posterize", 10, 4, 0),
    ("Solarize", 0, 0, 256),
    ("Solarize", 7, 179, 77),
    ("Solarize", 9, 230, 26),
    ("SolarizeAdd", 7, 77, 77),
    ("SolarizeAdd", 10, 110, 110),
    ("Color", 0, 0.1, 1.0),
    ("Contrast", 5, 1.0, 1.45),
    ("Brightness", 7, 1.36, 1.63),
    ("Sharpness", 10, 1.9, 1.9),
    ("ShearX", 7, 0.21, 0.21),
    ("ShearY", 10, 0.3, 0.3),
    ("TranslateXRel", 10, 0.45, 0.45),
    ("TranslateYRel", 2, 0.09, 0.09),
    ("Rotate", 20, 60.0, 60.0),
]


@pytest.mark.parametrize("name, magnitude, plain, increasing", TABLE)
def test_strengths_are_timm_s(name, magnitude, plain, increasing):
    for flag, expected in ((False, plain), (True, increasing)):
        got = strength(name, magnitude, flag, 1)
        assert got == (expected if expected is None else pytest.approx(expected, abs=1e-12))
        assert type(got) is type(expected)


def test_sign_turns_directions_and_increasing_enhancements():
    assert strength("ShearX", 10, True, -1) == -0.3 and strength("Rotate", 5, False, -1) == -15.0
    assert strength("Color", 5, True, -1) == pytest.approx(0.55)
    assert strength("Color", 20, True, -1) == 0.1  # not below
    assert strength("Color", 5, False, -1) == strength("Color", 5, False, 1)
    assert strength("Posterize", 5, True, -1) == strength("Posterize", 5, True, 1)


def pixels(name, argument, image):
    return np.asarray(augment.PIXELS[name](Image.fromarray(image), argument)).astype(int)


def test_pixel_operations_by_hand():
    image = np.asarray(picture(1, 32, 24))
    x = image.astype(int)
    np.testing.assert_array_equal(pixels("Invert", None, image), 255 - x)
    np.testing.assert_array_equal(pixels("Solarize", 100, image), np.where(x < 100, x, 255 - x))
    np.testing.assert_array_equal(pixels("SolarizeAdd", 50, image), np.where(x < 128, np.minimum(x + 50, 255), x))
    np.testing.assert_array_equal(pixels("Posterize", 3, image), x & 0b11100000)
    np.testing.assert_array_equal(pixels("Posterize", 8, image), x)
    np.testing.assert_array_equal(pixels("Posterize", 0, image), 0 * x)
    np.testing.assert_allclose(pixels("Brightness", 0.5, image), x * 0.5, atol=1)
    np.testing.assert_array_equal(pixels("Brightness", 1.0, image), x)
    grey = np.rint(x @ np.array([0.299, 0.587, 0.114]))
    np.testing.assert_allclose(pixels("Color", 0.25, image), grey[..., None] * 0.75 + x * 0.25, atol=2)
    np.testing.assert_allclose(pixels("Contrast", 1.5, image), np.clip(grey.mean() * -0.5 + x * 1.5, 0, 255), atol=2)
    stretched = pixels("AutoContrast", None, image)
    assert np.all(stretched.min(axis=(0, 1)) == 0) and np.all(stretched.max(axis=(0, 1)) >= 254)
    assert np.abs(np.diff(pixels("Sharpness", 0.1, image), axis=0)).sum() < np.abs(np.diff(x, axis=0)).sum()
    large = np.asarray(picture(1, 256, 256))
    spread = lambda values: np.std(np.histogram(values, 16, (0, 255))[0])
    assert spread(pixels("Equalize", None, large)) < 0.2 * spread(large)


def places(name, argument, image, how=augment.BILINEAR):
    return np.asarray(augment.PLACES[name](Image.fromarray(image), argument, how, (1, 2, 3)))


def test_place_operations_by_hand():
    image = np.asarray(picture(1, 32, 24))
    moved = places("TranslateXRel", 0.25, image)
    np.testing.assert_array_equal(moved[:, :24], image[:, 8:])
    assert np.all(moved[:, 24:] == (1, 2, 3))
    moved = places("TranslateYRel", -0.25, image)
    np.testing.assert_array_equal(moved[6:], image[:18])
    sheared = places("ShearX", 0.5, image, Image.Resampling.NEAREST)
    for y in range(
        24
    ):  # the source column of x in row y is x + (y + 0.5) / 2, its left neighbour's where that is a tie
        shift = math.floor((y + 0.5) * 0.5 + 0.5)
        np.testing.assert_array_equal(sheared[y, : 32 - shift], image[y, shift:])
    np.testing.assert_array_equal(places("Rotate", 180, image), image[::-1, ::-1])
    np.testing.assert_array_equal(places("ShearY", 0.0, image, augment.BICUBIC), image)
    assert np.all(places("Rotate", 45, image)[0, 0] == (1, 2, 3))


def test_operations_are_timm_s_fifteen():
    assert len(OPERATIONS) == 15 and set(OPERATIONS) == set(augment.PIXELS) | set(augment.PLACES)
    assert sum(augment.WEIGHTS) == pytest.approx(1.0) and len(augment.WEIGHTS) == 15


def counted(policy, monkeypatch, images=3000):
    """How often each operation ran, the arguments they got, and how many ran on each image."""
    ran, each = {name: [] for name in OPERATIONS}, []
    for name in OPERATIONS:

        def record(image, argument, *_, name=name):
            ran[name].append(argument)
            return image

        monkeypatch.setitem(augment.PLACES if name in augment.PLACES else augment.PIXELS, name, record)
    for seed in range(images):
        before = sum(map(len, ran.values()))
        policy(None, np.random.default_rng(seed))
        each.append(sum(map(len, ran.values())) - before)
    return ran, np.array(each)


def test_every_operation_is_drawn_evenly_and_applied_half_the_time(monkeypatch):
    ran, each = counted(RandAugment(9, 2), monkeypatch)
    np.testing.assert_allclose(np.bincount(each, minlength=3) / 3000, [0.25, 0.5, 0.25], atol=0.03)
    frequency = np.array([len(v) for v in ran.values()]) / 3000
    np.testing.assert_allclose(frequency, 2 * 0.5 / 15, atol=0.02)
    signs = np.sign(ran["Rotate"])
    assert abs(np.mean(signs)) < 0.2 and set(np.abs(ran["Rotate"])) == {27.0}


def test_weighted_choice_draws_by_the_table_without_repetition(monkeypatch):
    ran, _ = counted(RandAugment(9, 1, weighted=True), monkeypatch)
    np.testing.assert_allclose([len(v) / 1500 for v in ran.values()], augment.WEIGHTS, atol=0.03)
    assert not ran["Invert"] and not ran["Posterize"]


def test_magnitude_noise_is_normal_and_clipped(monkeypatch):
    magnitudes = np.abs(counted(RandAugment(9, 2, 0.5), monkeypatch)[0]["Rotate"]) / 3
    assert magnitudes.max() == pytest.approx(10.0) and np.mean(magnitudes == magnitudes.max()) < 0.1
    assert np.mean(magnitudes) == pytest.approx(9.0, abs=0.15) and np.std(magnitudes) == pytest.approx(0.5, abs=0.1)


def test_infinite_noise_is_uniform(monkeypatch):
    magnitudes = np.abs(counted(RandAugment(8, 2, math.inf), monkeypatch)[0]["Rotate"]) / 3
    np.testing.assert_allclose(np.quantile(magnitudes, [0.0, 0.25, 0.5, 0.75, 1.0]), [0, 2, 4, 6, 8], atol=1.0)


def test_color_jitter_stays_in_its_ranges_and_keeps_an_unchanged_image():
    image = picture(2)
    same = augment.jitter_color(image, np.random.default_rng(0), (0.0, 0.0, 0.0))
    np.testing.assert_array_equal(np.asarray(same), np.asarray(image))
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    levels = [
        np.asarray(augment.jitter_color(grey, np.random.default_rng(s), (0.4, 0, 0)))[0, 0, 0] for s in range(200)
    ]
    assert 60 <= min(levels) < 65 and 135 < max(levels) <= 140


def test_hue_jitter_turns_colours():
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    seen = [np.asarray(augment.jitter_color(red, np.random.default_rng(s), (0, 0, 0, 0.5)))[0, 0] for s in range(60)]
    assert {int(np.argmax(pixel)) for pixel in seen} == {0, 1, 2}
    assert all(pixel.max() == 255 and pixel.min() == 0 for pixel in seen)


def erased(mode, count=1, seed=0, size=60):
    image = np.full((size, size, 3), 200, np.uint8)
    result = augment.erase(
        image, np.random.default_rng(seed), mode=mode, count=count, mean=(100, 110, 120), std=(9, 9, 9)
    )
    assert result.dtype == np.uint8 and np.all(image == 200)
    return result


def test_erased_boxes_have_timm_s_areas_and_shapes():
    areas, shapes = [], []
    for seed in range(300):
        places = np.argwhere((erased("const", seed=seed) != 200).any(-1))
        h, w = places.max(0) - places.min(0) + 1
        assert len(places) == h * w  # one solid box
        areas.append(h * w / 3600)
        shapes.append(h / w)
    assert 0.015 < min(areas) < 0.04 and 0.3 < max(areas) < 0.36
    assert 0.25 < min(shapes) < 0.5 and 2 < max(shapes) < 4
    assert np.median(np.log(shapes)) == pytest.approx(0.0, abs=0.15)


def test_erasing_modes():
    box = lambda mode: erased(mode, seed=3)[(erased("const", seed=3) != 200).any(-1)]
    assert np.all(box("const") == (100, 110, 120))
    noise = [np.unique(erased("rand", seed=s).reshape(-1, 3), axis=0) for s in range(40)]
    assert all(len(colors) == 2 for colors in noise)
    spread = np.concatenate([erased("pixel", seed=s)[(erased("const", seed=s) != 200).any(-1)] for s in range(20)])
    assert len(np.unique(spread, axis=0)) > 100


def test_pixel_noise_has_the_given_moments():
    result = erased("pixel", seed=3, size=400).reshape(-1, 3).astype(float)
    inside = result[(result != 200).any(-1)]
    np.testing.assert_allclose(inside.mean(0), (100, 110, 120), atol=0.5)
    np.testing.assert_allclose(inside.std(0), 9, atol=0.5)


def test_several_boxes_share_the_area():
    areas = [np.mean((erased("const", 4, seed) != 200).any(-1)) for seed in range(200)]
    assert max(areas) < 1 / 3 + 0.01 and np.mean(areas) < 0.15
