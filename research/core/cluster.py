"""Several processes as one: joining them, and leaving with the status that asks for a restart when one is lost.

A collective cannot go on without one of its processes, so the survivors of a lost host have one thing to do: end, soon,
with status 42, and let the launcher start all of them again from the last checkpoint. A lost process shows itself as an
error of the collective (CPU, some GPU networks), as a missed heartbeat after `timeout` seconds (TPU), or, when it was
process 0, as a closed connection at once. In the last two cases JAX's coordination service aborts the process from one
of its own threads; that abort is turned into status 42 as well.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax

from research.core.errors import RESTART, UserError

LOG = logging.getLogger(__name__)

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# What the libraries below say when a process at the other end is gone.
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket closed",
    "heartbeat",
    "coordination service",
    "timed out waiting",
    "deadline_exceeded",
    "unavailable:",
    "nccl",
)
_GRACE = 5.0  # seconds that a failed process has for a save under way
_joining = threading.Event()
_kept = []  # what C code points to


def join(timeout: float = 100.0, *, patience: float = 300.0) -> None:
    """Finds the other processes of the job; to be called once, before JAX touches a device.

    SLURM, Cloud TPU and GKE jobs are recognised by their environment. Elsewhere JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who is who. CPU devices talk through gloo.

    Args:
      timeout: seconds without a sign of life after which a process counts as lost, and all others end with status 42.
      patience: seconds to wait for all processes to appear.
    Raises:
      UserError: the environment is incomplete.
    """
    described = {"num_processes": _number(COUNT), "process_id": _number(INDEX)}
    missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in os.environ]
    if missing and (COUNT in os.environ or INDEX in os.environ):
        raise UserError(f"--distributed: {' and '.join(missing)} must be set too")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from the loop
    _translate_aborts(f"not all processes appeared within {patience:.0f} s")
    _joining.set()
    try:
        jax.distributed.initialize(
            **described,
            initialization_timeout=round(patience),
            heartbeat_timeout_seconds=max(round(timeout), 1),
            shutdown_timeout_seconds=max(round(timeout), 1),
        )
    except (ValueError, TypeError) as error:
        text = f"--distributed: no job of several processes is recognised ({error}); set {ADDRESS}, {COUNT} and {INDEX}"
        raise UserError(text) from None
    finally:
        _joining.clear()


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.strip().isdecimal():
        raise UserError(f"{name}: {text!r} is not a number")
    return None if text is None else int(text)


def lost(error: BaseException) -> bool:
    """Whether the error says that another process, or the way to it, is gone."""
    text = str(error).lower()
    return any(phrase in text for phrase in _LOST)


def leave(reason: str) -> None:
    """Ends this process now, with one message and status 42; nothing that would wait for a lost process is run."""
    LOG.critical("process %d: %s; exiting with status %d", jax.process_index(), reason, RESTART)
    _exit(RESTART)


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Around work that needs all processes: a lost one ends this one with status 42.

    Any other error passes, and this process will not wait for the others at its end: they, in turn, find it lost.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, (RuntimeError, ValueError, OSError)) and lost(error):
            leave(f"lost another process ({_first_line(error)})")
        atexit.register(_exit, 1)  # runs before JAX's own farewell, which waits for everyone
        threading.Thread(target=_end_with_main, daemon=True).start()
        raise


def _end_with_main() -> None:
    """Ends the process soon after its main thread: threads of a save under way may be waiting for other processes."""
    threading.main_thread().join()
    time.sleep(_GRACE)
    _exit(1)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _exit(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _translate_aborts(joining: str) -> None:
    """Gives status 42 to an abort while joining, or outside the main thread: so JAX gives up on lost processes.

    Python's own signal handlers run between bytecodes, and `abort` does not come back to any: hence a C handler. An
    abort of the main thread later on (a failed check while compiling, say) stays what it is.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number):
        if _joining.is_set() or threading.get_ident() != threading.main_thread().ident:
            reason = joining if _joining.is_set() else "lost another process: JAX gave up on the job"
            os.write(2, f"{reason}; exiting with status {RESTART}\n".encode())
            os._exit(RESTART)

    _kept.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
