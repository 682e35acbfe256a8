"""Puts batches on the devices while the step before is still being computed."""

import queue
import threading
from collections.abc import Callable, Iterator


class Placed(Iterator[dict]):
    """Batches that a thread has taken and placed ahead of the step that needs them.

    Reading and decoding happen ahead in the pipeline already; this hides the copy to the devices, and what a step waits
    for is a queue. The order stays as it is.

    Args:
      batches: host batches; closed together with this iterator where they can be.
      put: host batch -> batch on the devices, `Runner.put`.
      ahead: batches placed and waiting; each takes its bytes on the devices. One more is being placed meanwhile.
    Raises:
      (from next) whatever `batches` or `put` raised, in the place of the batch it concerns.
    """

    def __init__(self, batches: Iterator[dict], put: Callable[[dict], dict], ahead: int = 1):
        self._batches, self._put = batches, put
        self._ready: queue.Queue = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="placing")
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                found = (self._put(next(self._batches)), None)
            except BaseException as error:  # it belongs to whoever takes the batch
                found = (None, error)
            self._ready.put(found)
            if found[1] is not None:
                return

    def __next__(self) -> dict:
        if self._stop.is_set():
            raise StopIteration
        batch, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return batch

    def close(self) -> None:
        """Stops the thread and closes the batches. No batch can be taken afterwards."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)  # room for what the thread still holds, so that it sees the end
            except queue.Empty:
                continue
        if hasattr(self._batches, "close"):
            self._batches.close()

    def __enter__(self) -> "Placed":
        return self

    def __exit__(self, *_) -> None:
        self.close()
