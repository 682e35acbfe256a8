"""Transforms: equal to Pillow where they say so, and distributed as the recipes say."""

import io
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from research.data import transforms
from research.data.base import BadExample
from research.data.transforms import build
from tests.data.make import encoded, jpeg, picture

few = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


def example(image):
    return {"image": image, "label": 3, "index": 8}


def applied(image, seed=0, **options):
    return build(train=True, **options)(example(image), np.random.default_rng(seed))["image"]


# Decoding.


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(40, 30), (1, 1), (17, 33)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_decodes_as_pillow_does(mode, size, options):
    data = encoded(picture(1, *size).convert(mode), **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(transforms.decode(data), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "I;16"])
def test_png_of_any_mode_becomes_rgb(mode):
    image = picture(2).convert("L").convert("I").convert("I;16") if mode == "I;16" else picture(2).convert(mode)
    options = {"transparency": bytes(range(200))} if mode == "P" else {}
    pixels = transforms.decode(encoded(image, "PNG", **options))
    assert pixels.shape == (30, 40, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    data = encoded(picture(3), exif=exif)
    np.testing.assert_array_equal(transforms.decode(data), transforms.decode(encoded(picture(3))))


def test_arrays_pass_and_grey_ones_become_rgb():
    image = np.asarray(picture())
    assert transforms.decode(image) is image
    assert transforms.decode(image[..., :1]).shape == image.shape


@pytest.mark.parametrize(
    "data, text",
    [
        (jpeg(0, 200, 200)[:-300], "truncated"),
        (jpeg(0, 200, 200)[:-2], "truncated"),
        (jpeg(0, 200, 200)[:150], "."),
        (b"", "empty"),
        (b"hello, this is no image", "not an image"),
        (encoded(picture(), "PNG")[:-40], "."),
    ],
)
def test_broken_images_are_bad_examples(data, text):
    with pytest.raises(BadExample, match=text):
        transforms.decode(data)


@few
@hypothesis.given(cut=st.integers(0, len(jpeg(5)) - 1))
def test_every_truncation_of_a_jpeg_is_found(cut):
    with pytest.raises(BadExample):
        transforms.decode(jpeg(5)[:cut])


# Evaluation.


@few
@hypothesis.given(st.integers(8, 90), st.integers(8, 90), st.integers(4, 48), st.sampled_from([0.875, 0.9, 0.95, 1.0]))
def test_evaluation_is_pillow_s_bicubic_bit_for_bit(width, height, size, crop):
    image = picture(width * 100 + height, width, height)
    got = build(train=False, size=size, crop=crop)(example(np.asarray(image)))
    short, long = math.floor(size / crop), max(width, height)
    other = int(short * long / min(width, height))
    resized = image.resize((short, other) if width <= height else (other, short), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    expected = resized.crop((left, top, left + size, top + size))
    np.testing.assert_array_equal(got["image"], np.asarray(expected))
    assert got["image"].shape == (size, size, 3) and got["image"].dtype == np.uint8
    assert (got["label"], got["label"].dtype, got["index"], got["index"].dtype) == (3, np.int32, 8, np.int32)


def test_evaluation_bilinear_differs_from_bicubic():
    images = [
        build(train=False, size=16, interpolation=how)(example(jpeg()))["image"] for how in ("bilinear", "bicubic")
    ]
    assert (images[0] != images[1]).any()


# Training.


def boxes(count=4000, height=375, width=500, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    rng = np.random.default_rng(0)
    return np.array([transforms.resized_crop_box(rng, height, width, scale, ratio) for _ in range(count)])


def test_resized_crops_are_inside_and_within_the_ranges():
    top, left, h, w = boxes().T
    assert np.all((top >= 0) & (left >= 0) & (top + h <= 375) & (left + w <= 500))
    area, aspect = h * w / (375 * 500), w / h
    assert area.min() > 0.075 and area.max() <= 1.0 and area.min() < 0.1 and area.max() > 0.95
    assert aspect.min() > 0.74 and aspect.max() < 1.35


def test_resized_crops_have_uniform_area_and_log_uniform_aspect():
    # Up to a fifth of the area every aspect fits, so nothing is rejected and the draws show as they are.
    top, left, h, w = boxes(scale=(0.05, 0.2)).T
    assert stats.kstest(h * w / (375 * 500), stats.uniform(0.05, 0.15).cdf).pvalue > 0.001
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert stats.kstest(np.log(w / h), stats.uniform(low, high - low).cdf).pvalue > 0.001
    assert stats.kstest(top / (375 - h + 1) + 0.5 / 375, stats.uniform().cdf).pvalue > 0.001
    assert stats.kstest(left / (500 - w + 1) + 0.5 / 500, stats.uniform().cdf).pvalue > 0.001


@pytest.mark.parametrize("height, width, expected", [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))])
def test_images_too_long_for_any_crop_give_the_largest_central_one(height, width, expected):
    assert transforms.resized_crop_box(np.random.default_rng(0), height, width, (0.9, 1.0), (3 / 4, 4 / 3)) == expected


@few
@hypothesis.given(st.integers(0, 10_000), st.sampled_from(["bilinear", "bicubic"]))
def test_resized_crop_is_pillow_s_crop_and_resize(seed, how):
    image = picture(7, 60, 45)
    got = applied(np.asarray(image), seed, size=24, flip=0.0, interpolation=how)
    top, left, h, w = transforms.resized_crop_box(np.random.default_rng(seed), 45, 60, (0.08, 1.0), (3 / 4, 4 / 3))
    filter_ = Image.Resampling[how.upper()]
    expected = image.crop((left, top, left + w, top + h)).resize((24, 24), filter_)
    np.testing.assert_array_equal(got, np.asarray(expected))


def test_random_interpolation_takes_both_about_equally():
    image = np.asarray(picture(9, 64, 64))
    options = dict(size=32, crop="none", flip=0.0)
    both = {how: applied(image, interpolation=how, **options).tobytes() for how in ("bilinear", "bicubic")}
    drawn = [applied(image, seed, **options).tobytes() for seed in range(200)]
    count = [drawn.count(both[how]) for how in ("bilinear", "bicubic")]
    assert sum(count) == 200 and 70 < count[0] < 130


@pytest.mark.parametrize("flip, low, high", [(0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)])
def test_flip_probability(flip, low, high):
    image = np.asarray(picture(4, 16, 16))
    results = [applied(image, seed, size=16, crop="none", flip=flip) for seed in range(200)]
    flipped = sum(np.array_equal(r, image[:, ::-1]) for r in results)
    assert low <= flipped <= high and flipped + sum(np.array_equal(r, image) for r in results) == 200


@few
@hypothesis.given(st.integers(0, 10_000))
def test_pad_crop_is_a_window_of_the_padded_image(seed):
    image = np.asarray(picture(4, 32, 32))
    got = applied(image, seed, size=32, crop="pad", flip=0.0)
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = image
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32, 3))[:, :, 0]
    assert (windows == got).all(axis=(2, 3, 4)).any()


def test_pad_crop_reaches_every_corner():
    image = np.full((8, 8, 3), 255, np.uint8)
    white = [np.argwhere(applied(image, s, size=8, crop="pad", pad=2, flip=0.0)[..., 0]).min(0) for s in range(300)]
    black = [
        8 - 1 - np.argwhere(applied(image, s, size=8, crop="pad", pad=2, flip=0.0)[..., 0]).max(0) for s in range(300)
    ]
    assert {tuple(a - b) for a, b in zip(white, black, strict=True)} == {
        (y, x) for y in range(-2, 3) for x in range(-2, 3)
    }


def test_size_is_met_by_every_crop():
    for crop in transforms.CROPS:
        assert applied(jpeg(1, 50, 20), size=28, crop=crop).shape == (28, 28, 3)


@pytest.mark.parametrize("options", [dict(auto="rand-m9-mstd0.5"), dict(jitter=(0.4, 0.4, 0.4, 0.1), erase=0.5)])
def test_the_generator_decides_everything(options):
    transform = build(train=True, size=24, **options)
    run = lambda seed: transform(example(jpeg(2)), np.random.default_rng(seed))["image"]
    np.testing.assert_array_equal(run(5), run(5))
    assert len({run(seed).tobytes() for seed in range(20)}) == 20


def test_erasing_happens_with_its_probability():
    image = np.asarray(picture(4, 16, 16))
    changed = [(applied(image, s, size=16, crop="none", flip=0.0, erase=0.25) != image).any() for s in range(400)]
    assert 65 < sum(changed) < 135


def test_rand_augment_paints_the_mean_colour():
    # Shears at full strength uncover corners.
    white = np.full((64, 64, 3), 255, np.uint8)
    seen = {
        tuple(applied(white, s, size=64, crop="none", auto="rand-m10-w0", mean=(0.1, 0.2, 0.3))[0, 0])
        for s in range(60)
    }
    assert (26, 51, 76) in seen  # 255 times the mean, rounded


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(crops="pad"), "augment.crops.*did you mean crop"),
        (dict(crop="padd"), "augment.crop: no 'padd'.*did you mean pad"),
        (dict(interpolation="cubic"), "augment.interpolation.*bicubic"),
        (dict(scale=(1.0, 0.5)), r"augment.scale: \(1.0, 0.5\)"),
        (dict(ratio=(0.0, 0.5)), "augment.ratio"),
        (dict(jitter=(0.1, 0.2)), "augment.jitter.*one, three or four"),
        (dict(jitter=0.4, auto="rand-m9"), "augment.jitter.*auto=''"),
        (dict(erase_mode="noise"), "augment.erase_mode"),
        (dict(auto="rand-m9-q2"), "augment.auto.*'q2'"),
        (dict(size=0), "augment.size"),
        (dict(train=False, crop=1.5), "eval.crop: 1.5"),
        (dict(train=False, interpolation="random"), "eval.interpolation"),
        (dict(train=False, flip=0.5), "eval.flip.*no such option"),
    ],
)
def test_wrong_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        build(**{"train": True, "size": 32, **options})
