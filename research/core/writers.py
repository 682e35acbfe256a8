"""Where metrics go: `metrics.jsonl` always, TensorBoard by option, a progress bar or plain lines for people to read.

A row of `metrics.jsonl` is one JSON object: `step`, `time` (Unix seconds), `kind` ("train", "eval", "done"), and values
named `train/...` or `eval/...`; a value that is not finite is null. The last row of a finished run is of kind "done".
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping

import jax
from tqdm import tqdm

from research.core import storage

FILE = "metrics.jsonl"


def read_rows(workdir: str | os.PathLike) -> list[dict]:
    """The rows of a run folder's `metrics.jsonl`, in order; [] without one. A torn last line is left out."""
    file = storage.folder(workdir) / FILE
    lines = file.read_text().splitlines() if file.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{file}: line {number} is not JSON: delete that line") from None
            continue
        rows.append(row)
    return rows


class Writer:
    """Writes the metrics of a run into its folder and to the terminal; on processes other than 0 it does nothing.

    Args:
      workdir: the run folder.
      steps: steps of the whole run.
      batch_size: global examples a step.
      flops_per_example: FLOPs of the model's mathematics for one training example (6 times the forward multiply-adds);
        0 leaves MFU out.
      peak_flops: FLOP/s of all devices together at most, see `research.core.peaks`; 0 leaves MFU out.
      tensorboard: whether to write TensorBoard events too.
      every: seconds between plain lines where the output is no terminal; the first and last step always have one.
      stream: where people read; stderr by default.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        steps: int,
        batch_size: int,
        flops_per_example: float = 0.0,
        peak_flops: float = 0.0,
        tensorboard: bool = True,
        every: float = 10.0,
        stream=None,
    ):
        self._folder, self._steps, self._batch = storage.folder(workdir), steps, batch_size
        self._flops, self._peak = flops_per_example, peak_flops
        self._active = jax.process_index() == 0
        # TensorBoard's event files are appended to, which an object store cannot do.
        self._tensorboard = tensorboard and not storage.remote(workdir)
        self._events, self._log = None, None
        self._progress = _Progress(steps, every, stream or sys.stderr) if self._active else None
        self._pace = 0.0  # seconds a step, averaged with a memory of a few rows

    def resume(self, step: int) -> None:
        """Starts or continues the history at `step`: rows beyond it, and a former end of the run, are dropped."""
        if not self._active:
            return
        rows = read_rows(self._folder)
        kept = [row for row in rows if row["step"] <= step and row["kind"] != "done"]
        self._log = storage.Log(self._folder / FILE, [json.dumps(row) for row in kept])
        if self._tensorboard and self._events is None:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(self._folder), purge_step=step + 1 if rows else None)
        self._progress.start(step)

    def train(self, step: int, values: Mapping[str, float], *, seconds: float, steps: int, waited: float = 0.0) -> None:
        """Writes training metrics and speed.

        Args:
          step: optimiser steps taken.
          values: means since the last call.
          seconds, steps: wall time and steps since the last call.
          waited: seconds of them spent waiting for data.
        """
        if not self._active:
            return
        rate = steps * self._batch / seconds
        pace = seconds / steps
        self._pace = 0.7 * self._pace + 0.3 * pace if self._pace else pace
        speed = {
            "examples_per_s": rate,
            "seconds_per_step": pace,
            "data_wait": waited / seconds,
            "memory_gb": memory() / 1e9,
        }
        if self._flops and self._peak:
            speed["mfu"] = rate * self._flops / self._peak
        self._row(step, "train", {**_named("train", values), **_named("train", speed)})
        self._progress.train(step, values, speed, self._pace * (self._steps - step))

    def eval(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of an evaluation."""
        if self._active:
            self._row(step, "eval", _named("eval", values))
            self._progress.say(f"step {step} evaluation: {_text(values)}")

    def done(self, values: Mapping[str, float]) -> None:
        """Writes the final row: the run is complete, and these are its results."""
        if self._active:
            self._row(self._steps, "done", _named("eval", values))
            self.close()

    def flush(self) -> None:
        """Brings a log in an object store up to date, which is otherwise written at intervals."""
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Ends the progress bar and the event file; later calls write nothing."""
        self.flush()
        for part in (self._progress, self._events):
            if part is not None:
                part.close()
        self._active, self._events = False, None

    def _row(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        if self._log is None:
            self.resume(0)
        row = {"step": int(step), "time": round(time.time(), 3), "kind": kind}
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._log.add(json.dumps(row | finite, allow_nan=False))
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()


class _Progress:
    """A bar on a terminal, else lines at intervals."""

    def __init__(self, steps: int, every: float, stream):
        self._steps, self._every, self._stream = steps, every, stream
        self._bar, self._last = None, -math.inf

    def start(self, step: int) -> None:
        if self._stream.isatty():
            self._bar = tqdm(total=self._steps, initial=step, unit="step", file=self._stream, dynamic_ncols=True)

    def train(self, step: int, values: Mapping[str, float], speed: Mapping[str, float], remaining: float) -> None:
        shown = {name: value for name, value in values.items() if name.rpartition("/")[2] in ("loss", "lr")}
        text = f"{_text(shown)}  {speed['examples_per_s']:.4g} examples/s"
        text += f"  MFU {100 * speed['mfu']:.3g} %" if "mfu" in speed else ""
        text += f"  {speed['memory_gb']:.3g} GB"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._steps or time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self.say(f"step {step}/{self._steps}  {text}  ETA {tqdm.format_interval(remaining)}")

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def memory() -> int:
    """Most bytes in use so far: of the fullest local device where the platform tells, else of this process."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return max(found) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _named(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {name if name.startswith(f"{kind}/") else f"{kind}/{name}": value for name, value in values.items()}


def _text(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
