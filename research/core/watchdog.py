"""Ends a run that stopped making progress: a hung collective or a stuck input cannot be unwound, only restarted.

Steps are dispatched long before they are finished: a healthy loop may well be waiting, and a hung one may still be
running ahead. Progress is therefore a step's result being there, asked for without waiting for it.
"""

import collections
import contextlib
import faulthandler
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from research.core import storage
from research.core.errors import RESTART

LOG = logging.getLogger(__name__)

PATIENCE = 10  # times the limit for what happens once, or rarely: restoring, compiling, evaluating, saving
_REPORT = 30.0  # seconds the report may take: the run folder may be what hangs


class Watchdog:
    """A thread that ends the process with status 42 after `seconds` in which no step finished; 0 switches it off.

    Before that it prints the stacks of all threads to stderr and writes them to `stacks-<process>.txt` in `folder`. The
    first step, evaluation and saving have PATIENCE times as long. What is counted is the thread's own ticks rather
    than a clock, so that a process that was stopped or a machine that slept is not taken for a hung one.

    Use it as a context around the loop.
    """

    def __init__(self, seconds: float = 0.0, folder: str | os.PathLike | None = None):
        self._seconds, self._folder = seconds, folder and storage.folder(folder)
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self._doing, self._beaten, self._step = "", False, None
        self._stop, self._thread = threading.Event(), None

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._process = jax.process_index()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        self._pending.clear()

    def dispatched(self, step: int, outputs) -> None:
        """Tells that a step was given to the devices; `outputs` are any of its results that will not be donated."""
        if self._thread:
            self._pending.append((step, jax.tree.leaves(outputs)[0]))

    def each(self, batches: Iterable) -> Iterator:
        """The batches of an evaluation; asking for the next one is a sign of life."""
        for batch in batches:
            self._beaten = True
            yield batch

    @contextlib.contextmanager
    def slow(self, what: str) -> Iterator[None]:
        """Work during which no step can finish, and which may take PATIENCE times as long as one."""
        before, self._doing, self._beaten = self._doing, what, True
        try:
            yield
        finally:
            self._doing, self._beaten = before, True

    def _watch(self) -> None:
        tick = min(self._seconds / 10, 1.0)
        idle = 0.0
        while not self._stop.wait(tick):
            idle = 0.0 if self._progressed() else idle + tick
            if idle >= self._seconds * (PATIENCE if self._doing or self._step is None else 1):
                self._bite(idle)

    def _progressed(self) -> bool:
        found, self._beaten = self._beaten, False
        while self._pending and self._pending[0][1].is_ready():
            self._step = self._pending.popleft()[0]
            found = True
        return found

    def _bite(self, idle: float) -> None:
        report = threading.Thread(target=self._report, args=(idle,), daemon=True)
        report.start()
        report.join(_REPORT)
        os._exit(RESTART)

    def _report(self, idle: float) -> None:
        since = f"no step finished for {idle:.0f} s" + (f" while {self._doing}" if self._doing else "")
        last = f"the last one was step {self._step}" if self._step is not None else "the first one has not"
        name = f"stacks-{self._process}.txt"
        where = f", stacks of all threads are in {self._folder / name}" if self._folder else ""
        text = f"hung: {since} ({last}){where}; exiting with status {RESTART}"
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(sys.stderr.fileno())
        LOG.critical(text)
        sys.stderr.flush()
        if self._folder:
            with tempfile.TemporaryFile("w+") as file:
                faulthandler.dump_traceback(file)
                file.seek(0)
                storage.write(self._folder / name, f"{text}\n\n{file.read()}")
