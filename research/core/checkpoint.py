"""Checkpoints by Orbax: state, data position and timer, written asynchronously, readable on any number of devices.

A folder `checkpoints/<step>/` holds the state (without `frozen`, which `init` rebuilds) and a small JSON record: the
position in the data as a global count of examples, seconds trained, and the shape of every leaf. Reading compares that
record with the state wanted before any array is touched: another model's checkpoint is refused by parameter name, while
a damaged checkpoint falls back to the one before it.

One save is in flight at a time: where the store is slower than the saves follow each other, the next one waits for it
and says so; a kill thus loses the steps since the last save that ended, fewer than two periods. A failed save is warned
about and tried again with the next one; a full disk, the run's last save, and TRIES failures in a row are errors.
"""

import contextlib
import errno
import logging
import os
import shutil
import time
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from research.core import cluster, seal, storage
from research.core.errors import UserError
from research.core.experiment import State
from research.core.sharding import paths

LOG = logging.getLogger(__name__)

# What goes wrong in Orbax is raised too, and told by us in one line.
logging.getLogger("absl").addFilter(lambda record: not ("orbax" in record.pathname and record.exc_info))

TRIES = 3  # failed saves in a row that end a run
TIMEOUT = 1200  # seconds after which a save that has not ended counts as failed
_NOTED = 1.0  # seconds of waiting for a save in flight that are worth a warning


class SaveFailed(UserError):
    """A checkpoint could not be written, and trying again later is no use; the message says what is left."""


class Progress(NamedTuple):
    """What is saved beside the state: examples drawn so far (over all hosts) and seconds spent training."""

    examples: int = 0
    seconds: float = 0.0


def _tree(state: State):
    """The part of the state that is written."""
    return {name: getattr(state, name) for name in ("step", "key", "params", "model_state", "opt_state", "ema")}


def _record(tree) -> dict[str, str]:
    return {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in paths(tree)}


def _differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What differs, the parameters first: the rest of a state follows from them."""
    lines = []
    for path in sorted({*saved, *wanted}, key=lambda path: (not path.startswith("params/"), path)):
        if path not in saved:
            lines.append(f"not in the checkpoint: {path} {wanted[path]}")
        elif path not in wanted:
            lines.append(f"only in the checkpoint: {path} {saved[path]}")
        elif saved[path] != wanted[path]:
            lines.append(f"{path}: checkpoint {saved[path]}, wanted {wanted[path]}")
    return lines


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
      folder: local or `gs://`; created if missing.
      keep: newest checkpoints kept; the best by `metric` is kept besides.
      metric: name of the evaluation metric that ranks checkpoints (higher is better), or "".
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2, metric: str = ""):
        self._folder = storage.folder(folder if storage.remote(folder) else os.path.abspath(folder))
        self._keep, self._metric = keep, metric
        self._flying: tuple[int, int] | None = None  # step and bytes of the save that is not yet known to have ended
        self._failures, self._succeeded = 0, False
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies = [ocp.checkpoint_managers.LatestN(self._keep)]
        if metric := self._metric:
            policies.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=lambda m: m[metric], n=1, keep_checkpoints_without_metrics=False
                )
            )
        # Made asynchronously, a folder that cannot be made leaves threads behind that wait for it for minutes.
        writing = ocp.AsyncOptions(timeout_secs=TIMEOUT, create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            async_options=writing,
            single_host_load_and_broadcast=False,
        )
        return ocp.CheckpointManager(
            self._folder,
            options=options,
            item_names=("state", "record"),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )

    def save(
        self, state: State, progress: Progress, metrics: dict[str, float] | None = None, *, final: bool = False
    ) -> None:
        """Starts writing a canonical state; returns when the arrays are copied, not when they are on disk.

        A step that is there already is left as it is: the same step of the same run is the same state.

        Args:
          state: its `step` names the checkpoint.
          progress: saved beside it.
          metrics: of this very state, to rank it.
          final: returns when the checkpoint is on disk, and tries TRIES times to get it there.
        Raises:
          SaveFailed: this save or the one before it failed, and not only for the moment.
        """
        self.wait()
        step = int(jax.device_get(state.step))
        tree = _tree(state)
        record = {"progress": progress._asdict(), "leaves": _record(tree)}
        ranked = {self._metric: metrics[self._metric]} if metrics and self._metric in metrics else None
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
        while step not in self._manager.all_steps():
            self._flying = step, sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            try:
                self._manager.save(step, args=args, metrics=ranked)
            except Exception as error:  # Orbax and its stores raise many types; each means: not written
                self._failed(error)
            if not final:
                break
            self.wait()
            time.sleep(self._failures)  # nothing but this save is left to do: give the store time

    def restore(self, shapes: State) -> tuple[State, Progress] | None:
        """The newest readable checkpoint in the form of `shapes` (with its shardings; `frozen` is None), or None.

        Raises:
          ValueError: the newest good checkpoint holds another model (differing parameters are named), or none is good.
        """
        self.wait()
        wanted = _tree(shapes)
        for step in sorted(self._manager.all_steps(), reverse=True):
            if problem := self._damage(step):
                self._report(step, problem)
                continue
            try:
                progress, saved = self._read_record(step)
                if not (differences := _differences(saved, _record(wanted))):
                    args = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
                    tree = jax.block_until_ready(self._manager.restore(step, args=args)["state"])
                    return State(**tree, frozen=None), progress
            except Exception as error:  # Orbax and its stores raise many types; each means: not readable
                self._report(step, (str(error).strip().splitlines() or [type(error).__name__])[0][:200])
                continue
            shown = "\n  ".join(differences[:8] + [f"… {len(differences) - 8} more"] * (len(differences) > 8))
            raise ValueError(f"checkpoint {self._folder / str(step)} holds another state:\n  {shown}")
        if self._manager.all_steps():
            raise ValueError(f"no checkpoint in {self._folder} is readable; move the folder away to start again")
        return None

    def _read_record(self, step: int) -> tuple[Progress, dict[str, str]]:
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        return Progress(**record["progress"]), record["leaves"]

    def _damage(self, step: int) -> str | None:
        """Damage as process 0 finds it; all processes decide alike."""
        problem = seal.damage(self._folder / str(step)) if jax.process_index() == 0 else None
        if jax.process_count() == 1:
            return problem
        found = multihost_utils.broadcast_one_to_all(np.asarray(problem is not None))
        return (problem or "see process 0") if found else None

    def _report(self, step: int, problem: str) -> None:
        LOG.warning("checkpoint %s is damaged (%s); using the one before it", self._folder / str(step), problem)

    def discard_after(self, step: int) -> None:
        """Removes checkpoints newer than `step` (damaged ones) and unfinished ones: training goes on from there."""
        for newer in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(newer)
        self._sweep()

    def latest(self) -> int | None:
        """The newest step on disk."""
        self.wait()
        return max(self._manager.all_steps(), default=None)

    def wait(self) -> None:
        """Blocks until what was saved is on disk, and seals it.

        Raises:
          SaveFailed: it could not be written, and not only for the moment; a first failure is a warning.
        """
        began = time.monotonic()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return
        if not self._flying:
            return
        if (waited := time.monotonic() - began) > _NOTED:
            LOG.warning("waited %.1f s for the checkpoint of step %d to be written", waited, self._flying[0])
        self._flying, self._failures, self._succeeded = None, 0, True
        if jax.process_index() == 0:
            for step in self._manager.all_steps():  # an earlier run may have been killed between saving and sealing
                seal.write(self._folder / str(step))

    def settle(self) -> None:
        """Seals what has reached the disk by now; does not block."""
        if self._flying and not self._manager.is_saving_in_progress():
            self.wait()

    def _failed(self, error: Exception) -> None:
        """Puts everything back to before the save; warns, or raises SaveFailed."""
        if jax.process_count() > 1 and cluster.lost(error):
            raise error
        step, size = self._flying or (-1, 0)
        self._flying, self._failures = None, self._failures + 1
        free = None if storage.remote(self._folder) else shutil.disk_usage(self._folder).free
        self._sweep()
        if jax.process_count() == 1:
            with contextlib.suppress(Exception):
                self._manager.close()
            self._manager = self._open()  # the old one remembers the step as saved, or as being saved
        kept = max((at for at in self._manager.all_steps() if at != step), default=None)
        left = f"the last good checkpoint is step {kept}" if kept is not None else "no checkpoint was written yet"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][-200:]
        text = f"the checkpoint of step {step} could not be written to {self._folder}"
        if _no_space(error):
            room = f"it needs about {size:,} bytes" + (f", {free:,} are left" if free is not None else "")
            again = "Make space and start the same command again"
            raise SaveFailed(f"{text}: no space left; {room}; {left}. {again}") from error
        if jax.process_count() > 1 and self._succeeded:
            # The others may wait for this save's barriers: only a restart brings all processes to one mind.
            cluster.leave(f"{text} ({reason}); {left}")
        if jax.process_count() > 1 or self._failures >= TRIES:
            raise SaveFailed(f"{text}, {self._failures} times in a row ({reason}); {left}") from error
        LOG.warning("%s (%s); it will be tried again with the next one; %s", text, reason, left)

    def _sweep(self) -> None:
        """Removes what unfinished saves left behind."""
        if jax.process_index() == 0 and not storage.remote(self._folder):  # in a store, saving again replaces them
            for unfinished in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def close(self) -> None:
        """Waits for what was saved and ends; raises SaveFailed where that failed."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _no_space(error: BaseException | None) -> bool:
    """Whether the store was full, by whatever the libraries between made of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(error) for text in ("No space left on device", "Disk quota exceeded", "ENOSPC", "EDQUOT")):
            return True
        error = error.__cause__ or error.__context__
    return False
