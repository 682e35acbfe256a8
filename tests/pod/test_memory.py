"""The loop keeps nothing: its memory is flat over thousands of steps, logging and saving included."""

from research.core import writers
from tests.pod.start import finish, start

BOUND = 8e6  # bytes in 4,000 steps and 4 saves: 2 kB kept of each step would be seen


def test_memory_is_flat_over_5000_steps(tmp_path):
    finish(start(tmp_path, "--optimized", "--steps", 5000, "--log-every", 50, "--save-every", 900, "--watch", 60))
    rows = [row for row in writers.read_rows(tmp_path) if row["kind"] == "train"]
    peak = {row["step"]: 1e9 * row["train/memory_gb"] for row in rows}
    assert peak[5000] - peak[1000] < BOUND, peak
