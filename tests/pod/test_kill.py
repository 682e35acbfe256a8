"""`kill -9` at any moment costs no more than the steps since the last save, and never the folder."""

import signal
import time

import numpy as np
import pytest

from research.core import seal
from tests.pod.start import assert_identical, finish, results, saved, start

KILLS, STEPS, EVERY = 20, 130, 2


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    finish(start(folder, "--steps", STEPS))
    return results(folder)


def kill_at(process, lines: int, delay: float) -> int:
    """Kills a run `delay` seconds after it told of its `lines`-th step; the last step it told of, or 0."""
    told = 0
    for _ in range(lines):
        told = int(process.stdout.readline().removeprefix("step "))
    time.sleep(delay)
    process.kill()
    rest, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return int(([f"step {told}"] + [line for line in rest.splitlines() if line])[-1].removeprefix("step "))


def test_killed_at_twenty_random_moments(straight, tmp_path):
    """Restoring, compiling, training and saving are all hit; at the end the run is the one that was never killed."""
    rng = np.random.default_rng(0)
    before, unfinished = 0, 0
    for _ in range(KILLS):
        # From the start of the process, or from one of its first steps: then a save is nearly always under way.
        moment = (0, rng.uniform(0, 2)) if rng.random() < 0.2 else (rng.integers(1, 10), rng.uniform(0, 0.02))
        step = max(kill_at(start(tmp_path, "--steps", STEPS, "--save-every", EVERY), *moment), before)
        newest = max(saved(tmp_path), default=0)
        # A save begins when the one before it is on disk: one may be cut off, not two.
        assert newest >= step - 2 * EVERY and newest >= before
        before = newest
        folder = tmp_path / "checkpoints"
        assert all(seal.damage(folder / str(found)) is None for found in saved(tmp_path)[-1:])
        unfinished += any("tmp" in path.name for path in folder.glob("*"))
    assert unfinished >= 3  # the moments were not all harmless ones
    finish(start(tmp_path, "--steps", STEPS, "--save-every", EVERY))
    assert_identical(results(tmp_path), straight)
