"""Recorded augmentation: replayed to the last bit, in any process, and refused where it does not fit."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data import tape, transforms
from tests.data.make import jpeg

OPTIONS = {
    "resized": dict(crop="resized"),
    "pad": dict(crop="pad", pad=3),
    "none": dict(crop="none", flip=1.0),
    "auto": dict(auto="rand-m9-n3-mstd0.5-inc1"),
    "uniform": dict(auto="rand-m9-mstd101-w0"),
    "jitter": dict(jitter=(0.4, 0.4, 0.4, 0.1)),
    "pixel": dict(erase=0.9, erase_mode="pixel", erase_count=3),
    "rand": dict(erase=0.9, erase_mode="rand"),
    "const": dict(erase=0.9, erase_mode="const"),
}
EXAMPLE = {"image": jpeg(), "label": 3, "index": 5}


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(OPTIONS)), seed=st.integers(0, 2**32))
def test_a_replayed_view_is_the_recorded_one(name, seed):
    transform = transforms.build(train=True, size=16, **OPTIONS[name])
    made, found = tape.record(transform, EXAMPLE, np.random.default_rng(seed))
    kept, end = tape.unpack(b"xx" + tape.pack(found) + b"more", 2)
    assert kept == found and end == 4 + 5 * len(found.kinds)
    again = tape.replay(transform, EXAMPLE, kept)
    np.testing.assert_array_equal(again["image"], made["image"])
    assert again["label"] == 3 and again["index"] == 5


PROGRAM = """
import hashlib
import numpy as np
from research.data import tape, transforms
from tests.data.make import jpeg
transform = transforms.build(train=True, size=16, auto="rand-m9-n2-mstd0.5", erase=1.0)
found, _ = tape.unpack(bytes.fromhex("{recorded}"))
result = tape.replay(transform, {{"image": jpeg(), "label": 3, "index": 5}}, found)
print(hashlib.sha1(result["image"].tobytes()).hexdigest())
"""


def test_another_process_replays_the_same_pixels():
    transform = transforms.build(train=True, size=16, auto="rand-m9-n2-mstd0.5", erase=1.0)
    made, found = tape.record(transform, EXAMPLE, np.random.default_rng(4))
    program = PROGRAM.format(recorded=tape.pack(found).hex())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == hashlib.sha1(made["image"].tobytes()).hexdigest()


def test_a_written_tape_means_the_same_for_ever():
    """What a tape of 2026 gives, number by number: NumPy's generators have no part in it."""
    draws = tape.Player(tape.Tape(b"fficcoossn", (1 << 31, 1, 7, 3, 0, 1, 0, 1, 2, 0x3F000000)))
    assert draws.random() == 0.5 and draws.uniform(1, 2) == 1 + 2**-32 and draws.integers(2, 12) == 9
    assert draws.choice(4, 2).tolist() == [3, 0] and draws.permutation(2).tolist() == [1, 0]
    noise = draws.normal(size=(2, 10))
    assert draws.normal(1.0, 2.0) == 2.0
    draws.close()
    np.testing.assert_array_equal(noise, tape.noise((1 << 32) + 2, (2, 10)))


def test_noise_is_splitmix64_through_normal_quantiles():
    # The first outputs of splitmix64 from seed 1234567 (Vigna's reference program).
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    from scipy.special import ndtri

    halves = np.array(words, "<u8").view("<u2").astype(np.float64)
    np.testing.assert_allclose(tape.noise(1234567, (3, 4)).ravel(), ndtri((halves + 0.5) / 65536), atol=1e-7)
    many = tape.noise(1, (200_000,))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    assert np.unique(tape.noise(2, (5,)) == tape.noise(3, (5,))).tolist() == [False]


def test_recorded_draws_have_the_generators_distributions():
    recorder = tape.Recorder(np.random.default_rng(0))
    fractions = np.array([recorder.uniform(2, 4) for _ in range(2000)])
    assert 2 <= fractions.min() < 2.01 and 3.99 < fractions.max() < 4 and abs(fractions.mean() - 3) < 0.05
    assert set(recorder.integers(1, 4, 100).tolist()) == {1, 2, 3}
    normal = np.array([recorder.normal(5, 2) for _ in range(2000)])
    assert abs(normal.mean() - 5) < 0.2 and abs(normal.std() - 2) < 0.2
    assert sorted(recorder.choice(5, 5, replace=False)) == list(range(5))
    assert len(recorder.tape.kinds) == len(recorder.tape.words) == 2000 + 100 + 2000 + 5


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(flip=0.5, erase=0.5), "asks for a fraction, recorded is nothing more"),
        (dict(flip=0.5, crop="none"), "draw 1 asks for an integer, recorded is a fraction"),
        (dict(flip=0.5, jitter=0.4), "asks for a permutation"),
    ],
)
def test_other_options_are_refused(other, message):
    made = tape.record(transforms.build(train=True, size=16), EXAMPLE, np.random.default_rng(0))[1]
    with pytest.raises(tape.Mismatch, match=message):
        tape.replay(transforms.build(train=True, size=16, **other), EXAMPLE, made)


def test_draws_left_over_numbers_out_of_range_and_cut_bytes_are_refused():
    auto = transforms.build(train=True, size=16, auto="rand-m9-n2")
    made = tape.record(auto, EXAMPLE, np.random.default_rng(0))[1]
    with pytest.raises(tape.Mismatch, match=r"8 draws are asked for, \d+ are recorded"):
        tape.replay(transforms.build(train=True, size=16), EXAMPLE, made)
    with pytest.raises(tape.Mismatch, match="draw 1 asks for an integer below 2, recorded is 5"):
        tape.Player(tape.Tape(b"i", (5,))).integers(2)
    with pytest.raises(ValueError, match="a tape of"):
        tape.unpack(tape.pack(made)[:-1])
