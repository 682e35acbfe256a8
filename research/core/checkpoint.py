"""Checkpoints by Orbax: state, data position and timer, written asynchronously, readable on any number of devices.

A folder `checkpoints/<step>/` holds the state (without `frozen`, which `init` rebuilds) and a small JSON record: the
position in the data as a global count of examples, seconds trained, and the shape of every leaf. Reading compares that
record with the state wanted before any array is touched: another model's checkpoint is refused by parameter name, while
a damaged checkpoint falls back to the one before it.
"""

import logging
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from research.core import seal
from research.core.experiment import State
from research.core.sharding import paths

LOG = logging.getLogger(__name__)


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
      folder: created if missing.
      keep: newest checkpoints kept; the best by `metric` is kept besides.
      metric: name of the evaluation metric that ranks checkpoints (higher is better), or "".
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2, metric: str = ""):
        policies = [ocp.checkpoint_managers.LatestN(keep)]
        if metric:
            policies.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=lambda m: m[metric], n=1, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            single_host_load_and_broadcast=False,
        )
        self._folder = pathlib.Path(folder).absolute()
        self._metric = metric
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=options,
            item_names=("state", "record"),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )

    def save(self, state: State, progress: Progress, metrics: dict[str, float] | None = None) -> None:
        """Starts writing a canonical state; returns when the arrays are copied, not when they are on disk.

        A step that is there already is left as it is: the same step of the same run is the same state.
        """
        self.wait()
        step = int(jax.device_get(state.step))
        if step in self._manager.all_steps():
            return
        tree = _tree(state)
        record = {"progress": progress._asdict(), "leaves": _record(tree)}
        ranked = {self._metric: metrics[self._metric]} if metrics and self._metric in metrics else None
        args = ocp.args.Composite(state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
        self._manager.save(step, args=args, metrics=ranked)

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
        """Removes checkpoints newer than `step` (damaged ones), so that their steps can be written again."""
        for newer in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(newer)

    def latest(self) -> int | None:
        """The newest step on disk."""
        self.wait()
        return max(self._manager.all_steps(), default=None)

    def wait(self) -> None:
        """Blocks until what was saved is on disk, and seals it; raises what went wrong there."""
        self._manager.wait_until_finished()
        self._seal()

    def settle(self) -> None:
        """Seals what has reached the disk by now; does not block."""
        if not self._manager.is_saving_in_progress():
            self._seal()

    def _seal(self) -> None:
        if jax.process_index() == 0:
            for step in self._manager.all_steps():
                seal.write(self._folder / str(step))

    def close(self) -> None:
        self.wait()
        self._manager.close()
