"""The one training loop: step, log, evaluate, save, resume.

It stops cleanly on a signal and on a non-finite loss, and ends where it cannot go on: see README.md, "What happens when
things break".
"""

import contextlib
import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from research.core import cluster
from research.core import metrics as metrics_lib
from research.core.checkpoint import Checkpoints, Progress, SaveFailed
from research.core.errors import RESTART
from research.core.runner import Runner
from research.core.watchdog import Watchdog
from research.core.writers import Writer

LOG = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run was told to stop, has saved its state, and exits with the status that asks for a restart."""

    def __init__(self):
        super().__init__(RESTART)


class NonFinite(ValueError):
    """A metric became NaN or infinite; the message names it, its step and the last good checkpoint."""


class Plan(NamedTuple):
    """When things happen, in steps; 0 switches a periodic action off (the last step always logs, evaluates and saves).

    Attributes:
      steps: total optimiser steps of the run.
      batch_size: global examples a step.
      log_every, eval_every, save_every: periods.
      stop_every: with several processes, steps between agreements on whether one of them was told to stop.
    """

    steps: int
    batch_size: int
    log_every: int = 50
    eval_every: int = 0
    save_every: int = 0
    stop_every: int = 10


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGUSR1 set, as schedulers send them before they take a machine away."""
    event = threading.Event()
    signals = (signal.SIGTERM, signal.SIGUSR1)
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield event
        return
    previous = {s: signal.signal(s, lambda *_: event.set()) for s in signals}
    try:
        yield event
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def _agreed(stop: threading.Event, step: int, every: int) -> bool:
    """Whether to stop at this step: all processes get the same answer at the same step."""
    if jax.process_count() == 1:
        return stop.is_set()
    if step % every:
        return False
    with jax.transfer_guard("allow"):
        return bool(np.any(multihost_utils.process_allgather(np.asarray(stop.is_set()))))


class _Window:
    """Metrics of the steps since the last log line, fetched from the devices together."""

    def __init__(self):
        self._pending: list[tuple[int, dict]] = []

    def add(self, step: int, metrics: dict) -> None:
        self._pending.append((step, metrics))

    def flush(self) -> dict[str, float]:
        """Means since the last call; a NonFinite names the first step with a NaN or an infinity."""
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self._pending]
        self._pending.clear()
        for step, metrics in fetched:
            for name, (total, _) in metrics.items():
                if not np.all(np.isfinite(total)):
                    raise NonFinite(f"{name} became {float(np.sum(total))} at step {step}")
        return metrics_lib.finish(metrics_lib.merge(*[metrics for _, metrics in fetched])) if fetched else {}


def total(found: Iterable[dict]) -> dict[str, float]:
    """Exact means of the metrics of several batches, given as dicts of (sum, count) pairs."""
    return metrics_lib.finish(functools.reduce(metrics_lib.merge, map(jax.device_get, found), {}))


def evaluate(runner: Runner, state, batches: Iterable[dict]) -> dict[str, float]:
    """Exact means of the experiment's evaluation metrics over all examples of `batches`."""
    return total(runner.eval_step(state, runner.put(batch)) for batch in batches)


def start(runner: Runner, key: jax.Array, checkpoints: Checkpoints | None):
    """The state to continue from and its progress: the newest good checkpoint's, or a new one."""
    state = runner.init(key)
    restored = checkpoints.restore(runner.shapes) if checkpoints else None
    if restored is None:
        return state, Progress()
    saved, progress = restored
    # The frozen part is not in the checkpoint. It is taken from the new state while both are in canonical form.
    state = runner.place(saved.replace(frozen=runner.canonical(state).frozen))
    return state, progress


def fit(
    runner: Runner,
    plan: Plan,
    *,
    key: jax.Array,
    train_batches: Callable[[int], Iterator[dict]],
    eval_batches: Callable[[], Iterator[dict]] | None = None,
    checkpoints: Checkpoints | None = None,
    writer: Writer | None = None,
    watchdog: Watchdog | None = None,
):
    """Trains to `plan.steps` and returns (final placed state, last evaluation metrics).

    Args:
      runner: the experiment on its devices.
      plan: lengths and periods.
      key: root of all randomness of the run.
      train_batches: first step -> endless iterator of this process's rows of each global batch from that step on.
      eval_batches: -> iterator over the evaluation set, or None.
      checkpoints: where to save to and resume from, or None.
      writer: where metrics go, or None.
      watchdog: ends the process when no step finishes any more, or None.
    Raises:
      NonFinite: a training metric is NaN or infinite.
      Preempted: a stop signal arrived; the state is saved.
      SaveFailed: a checkpoint cannot be written.
    """
    with cluster.guard(), stop_signals() as stop, watchdog or Watchdog() as watch:
        return _fit(runner, plan, key, train_batches, eval_batches, checkpoints, writer, watch, stop)


def _fit(runner, plan, key, train_batches, eval_batches, checkpoints, writer, watch, stop):
    state, progress = start(runner, key, checkpoints)
    first = progress.examples // plan.batch_size
    if first:
        LOG.info("resumed at step %d", first)
    if checkpoints:
        checkpoints.discard_after(first)
    if writer:
        writer.resume(first)
    results: dict[str, float] = {}
    began, window, waited, logged = time.monotonic(), _Window(), 0.0, first

    def due(step: int, every: int) -> bool:
        return step == plan.steps or bool(every and step % every == 0)

    def evaluated(step: int) -> dict[str, float]:
        with watch.slow("evaluating"):
            found = evaluate(runner, state, watch.each(eval_batches()))
        if writer and step > first:
            writer.eval(step, found)
        return found

    def save(step: int, ranked_by: dict[str, float] | None, final: bool) -> None:
        if writer:
            writer.flush()  # a resumed run has the rows up to its checkpoint
        if checkpoints:
            spent = progress.seconds + time.monotonic() - began
            with watch.slow("saving"):
                reached = Progress(step * plan.batch_size, spent)
                checkpoints.save(runner.canonical(state), reached, ranked_by, final=final)

    batches = train_batches(first)
    mark = time.monotonic()
    for step in range(first + 1, plan.steps + 1):
        asked = time.monotonic()
        batch = next(batches)
        waited += time.monotonic() - asked
        batch = runner.put(batch)
        with jax.transfer_guard("disallow"):
            state, metrics = runner.train_step(state, batch)
        window.add(step, metrics)
        watch.dispatched(step, metrics)
        stopping = _agreed(stop, step, plan.stop_every)
        saving, evaluating = due(step, plan.save_every), due(step, plan.eval_every) and eval_batches is not None
        if step == first + 1 or due(step, plan.log_every) or saving or evaluating or stopping:
            try:
                values = window.flush()
            except NonFinite as error:
                raise NonFinite(_advice(str(error), checkpoints)) from None
            now = time.monotonic()
            if writer:
                writer.train(step, values, seconds=now - mark, steps=step - logged, waited=waited)
            mark, waited, logged = now, 0.0, step
            if checkpoints:
                checkpoints.settle()
        if evaluating:
            results = evaluated(step)
            mark = time.monotonic()  # evaluation is not training time
        if saving or stopping:
            # An older evaluation says nothing of this state. What is saved last has to be on disk before the end.
            save(step, results if evaluating else None, final=stopping or step == plan.steps)
        if stopping and step < plan.steps:
            kept = f"step {step} is saved" if checkpoints else f"nothing is kept of {step} steps, as nothing is saved"
            LOG.warning("told to stop: %s, exiting with status %d", kept, RESTART)
            raise Preempted()
    if first >= plan.steps and eval_batches is not None:
        results = evaluated(first)
    return state, results


def _advice(text: str, checkpoints: Checkpoints | None) -> str:
    try:
        last = checkpoints.latest() if checkpoints else None
    except SaveFailed as error:
        text, last = f"{text}; {error}", None
    kept = f"the last good checkpoint is step {last}" if last is not None else "no checkpoint was written yet"
    return f"{text}; {kept}. Lower optimizer.lr, clip gradients (optimizer.clip), or compute in float32 (dtype)"
