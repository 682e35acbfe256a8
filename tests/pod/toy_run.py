"""Trains the toy experiment as a process of its own, printing each step: `python toy_run.py WORKDIR [options]`."""

import argparse
import os
import sys

parser = argparse.ArgumentParser()
parser.add_argument("workdir")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--save-every", type=int, default=5)
parser.add_argument("--optimized", action="store_true", help="slow to compile, fast to run")
parser.add_argument("--log-every", type=int, default=1)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--mode", default="jit")
parser.add_argument("--fsdp", type=int, default=1)
parser.add_argument("--poison", type=int, default=-1)
parser.add_argument("--signal-at", type=int, default=-1, help="send this process the signal before the step's batch")
parser.add_argument("--signal", default="SIGTERM")
parser.add_argument("--examples", type=int, default=0, help="evaluate on that many at the end")
parser.add_argument("--distributed", type=float, default=0, help="join others; seconds to miss one")
parser.add_argument("--patience", type=float, default=60, help="seconds to wait for the other processes")
parser.add_argument("--watch", type=float, default=0, help="seconds without a finished step that end the process")
parser.add_argument("--pause-at", type=int, nargs="*", default=(), help="before these steps, wait for a line on stdin")
parser.add_argument("--raise-at", type=int, default=-1, help="fail at the step's batch")
parser.add_argument("--slow-store", type=float, default=0, help="seconds that every save takes longer")
parser.add_argument("--clock", type=int, nargs=2, default=(0, 0), help="step at which the clock jumps, by how much")
args = parser.parse_args()

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# What is given last counts: the flags of the tests make it quick to compile, with another number of devices.
quick = "" if args.optimized else os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{quick} --xla_force_host_platform_device_count={args.devices}"

import functools
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import toy

from research.core import cluster, loop, runner
from research.core.checkpoint import Checkpoints
from research.core.errors import cli
from research.core.watchdog import Watchdog
from research.core.writers import Writer


class Printing(Writer):
    """Also prints the step of every row, so that a parent can act at a step."""

    def train(self, step, *rest, **named):
        super().train(step, *rest, **named)
        print("step", step, flush=True)


def jumped(clock):
    return clock() + args.clock[1]


def share():
    return {"process": jax.process_index(), "processes": jax.process_count()}


def train_batches(first):
    for step, batch in enumerate(toy.batches(first, **share()), start=first + 1):
        if step == args.signal_at:
            os.kill(os.getpid(), signal.Signals[args.signal])
        if step in args.pause_at:
            print("paused", flush=True)
            sys.stdin.readline()
        if step == args.raise_at:
            raise ZeroDivisionError("a bug")
        if step == args.clock[0]:
            time.time = functools.partial(jumped, time.time)
        yield batch


class Late:
    """The end of a write that takes its time."""

    def __init__(self, written):
        self._written = written

    def result(self, timeout=None):
        time.sleep(args.slow_store)
        return self._written.result(timeout)


def slow_store():
    """Makes every save wait for a slow store, in the threads that write it."""
    save = ocp.JsonCheckpointHandler.async_save

    async def late(*given, **named):
        return [Late(written) for written in await save(*given, **named)]

    ocp.JsonCheckpointHandler.async_save = late


@cli
def main(argv):
    if args.distributed:
        cluster.join(args.distributed, patience=args.patience)
    if args.slow_store:
        slow_store()
    axes = {"data": -1, "fsdp": args.fsdp}
    run = runner.build(toy.build(poison=args.poison), mode=args.mode, axes=axes, rules=[(".*", "fsdp")])
    plan = loop.Plan(args.steps, toy.BATCH, log_every=args.log_every, save_every=args.save_every, stop_every=1)
    checkpoints = Checkpoints(os.path.join(args.workdir, "checkpoints"))
    writer = Printing(args.workdir, steps=plan.steps, batch_size=plan.batch_size, tensorboard=False)
    state, _ = loop.fit(
        run,
        plan,
        key=jax.random.PRNGKey(0),
        train_batches=train_batches,
        eval_batches=(lambda: toy.held_out(args.examples, **share())) if args.examples else None,
        checkpoints=checkpoints,
        writer=writer,
        watchdog=Watchdog(args.watch, args.workdir),
    )
    final = run.canonical(state)
    params = jax.tree.leaves(jax.jit(lambda x: x, out_shardings=run.shapes.key.sharding)(final.params))
    if jax.process_index() == 0:
        np.savez(os.path.join(args.workdir, "params.npz"), *[np.asarray(x.addressable_shards[0].data) for x in params])
    checkpoints.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
