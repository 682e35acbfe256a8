"""Trains the toy experiment as a process of its own, printing each step: `python toy_run.py WORKDIR [options]`."""

import argparse
import os
import sys

parser = argparse.ArgumentParser()
parser.add_argument("workdir")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--save-every", type=int, default=5)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--mode", default="jit")
parser.add_argument("--fsdp", type=int, default=1)
parser.add_argument("--processes", type=int, default=1)
parser.add_argument("--process", type=int, default=0)
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--poison", type=int, default=-1)
parser.add_argument("--signal-at", type=int, default=-1, help="send this process the signal before the step's batch")
parser.add_argument("--signal", default="SIGTERM")
args = parser.parse_args()

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices} --xla_backend_optimization_level=0"

import signal

import jax

if args.processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process)

import numpy as np
import toy

from research.core import loop, runner
from research.core.checkpoint import Checkpoints
from research.core.errors import cli
from research.core.writers import Writer


class Printing(Writer):
    """Also prints the step of every row, so that a parent can act at a step."""

    def train(self, step, *rest, **named):
        super().train(step, *rest, **named)
        print("step", step, flush=True)


def train_batches(first):
    share = {"process": jax.process_index(), "processes": jax.process_count()}
    for step, batch in enumerate(toy.batches(first, **share), start=first + 1):
        if step == args.signal_at:
            os.kill(os.getpid(), signal.Signals[args.signal])
        yield batch


@cli
def main(argv):
    axes = {"data": -1, "fsdp": args.fsdp}
    run = runner.build(toy.build(poison=args.poison), mode=args.mode, axes=axes, rules=[(".*", "fsdp")])
    plan = loop.Plan(args.steps, toy.BATCH, log_every=1, save_every=args.save_every, stop_every=1)
    checkpoints = Checkpoints(os.path.join(args.workdir, "checkpoints"))
    writer = Printing(args.workdir, steps=plan.steps, batch_size=plan.batch_size, tensorboard=False)
    state, _ = loop.fit(
        run, plan, key=jax.random.PRNGKey(0), train_batches=train_batches, checkpoints=checkpoints, writer=writer
    )
    final = run.canonical(state)
    params = jax.tree.leaves(jax.jit(lambda x: x, out_shardings=run.shapes.key.sharding)(final.params))
    if jax.process_index() == 0:
        np.savez(os.path.join(args.workdir, "params.npz"), *[np.asarray(x.addressable_shards[0].data) for x in params])
    checkpoints.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
