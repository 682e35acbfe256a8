"""Experiments that take over from each other: what changes at a few known steps and no program can take as a value.

Numbers of a schedule are values of the step (`research.core.scheduled`). What sets shapes, such as how many tokens of
an image go on, needs a program for each value. These are branches of one program here: it is compiled once, before the
first step, for as many stages as there are; the state's step chooses, so that a run continues in the right stage after
any restart; what compiles ahead of time, measures or profiles a step needs to know nothing of it. Compiled for TPUs,
memory and cycles are those of the branch that is taken; on CPUs XLA computes a branch less well than a whole program: a
small ViT's step took 1.4 times as much CPU time.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.core.experiment import Experiment, State, scalar


def staged(last: Experiment, earlier: Sequence[tuple[int, Experiment]]) -> Experiment:
    """`last`, whose first steps are those of other experiments; its own are initial state, weights and evaluation.

    The metric `stage` counts them from 0. Without earlier ones it is `last` itself.

    Args:
      last: from the last of the `earlier` steps on.
      earlier: (step before which it holds, experiment), the steps ascending. States and metrics are of one form.
    Raises:
      ValueError: steps that do not ascend from 1.
    """
    ends = [end for end, _ in earlier]
    if any(end <= before for before, end in zip([0, *ends], ends, strict=False)):
        raise ValueError(f"stages end at steps {', '.join(map(str, ends))}: these have to ascend from 1")
    if not earlier:
        return last
    branches = [made.train_step for _, made in earlier] + [last.train_step]

    def train_step(state: State, batch):
        stage = sum((state.step >= end).astype(jnp.int32) for end in ends)
        new, metrics = jax.lax.switch(stage, branches, state, batch)
        return new, metrics | {"stage": scalar(stage)}

    return last._replace(train_step=train_step)
