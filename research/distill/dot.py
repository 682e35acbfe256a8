"""DOT, the distillation-oriented trainer, as an optax transformation. Zhao et al. 2023.

SGD with two momentum buffers: the task's gradient decays faster than the distillation's, so the latter dominates where
the two disagree. The two gradients come separately, so they are what `update` takes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Gradients(NamedTuple):
    """Gradients of the task's and of the distillation's loss; None for a leaf that a loss does not reach.

    Reach matters: leaves that only one loss reaches, as adaptors are, have the plain momentum.
    """

    task: Any
    kd: Any


class State(NamedTuple):
    """Momentum buffers of both losses, trees like the parameters, and the number of updates."""

    task: Any
    kd: Any
    count: jax.Array


def dot(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    delta: float | jax.Array = 0.075,
    weight_decay: float = 0.0,
    mask: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """m_task = (momentum - delta) m_task + g_task + weight_decay p; m_kd = (momentum + delta) m_kd + g_kd.

    Parameters move by -lr (m_task + m_kd). Weight decay enters the task's gradient, or that of the
    only loss. The published deltas are 0.075 (CIFAR-100) and 0.09 (ImageNet).

    Args:
      learning_rate: number, or step -> number.
      mask: params -> tree of bools, where weight decay applies; everywhere without.
    Raises:
      ValueError: at update, without params, or a leaf that neither loss reaches.
    """

    def init(params):
        return State(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)), jnp.zeros((), jnp.int32))

    def update(gradients, state, params=None):
        if params is None:
            raise ValueError("dot decays weights: call update(gradients, state, params)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        decayed = mask(params) if mask else jax.tree.map(lambda _: True, params)
        treedef = jax.tree.structure(params)
        trees = (params, gradients.task, gradients.kd, state.task, state.kd, decayed)
        leaves = zip(*map(treedef.flatten_up_to, trees), strict=True)
        found = [_step(*leaf, momentum, delta, weight_decay) for leaf in leaves]
        updates, task, kd = (treedef.unflatten(column) for column in zip(*found, strict=True))
        updates = jax.tree.map(lambda m: (-jnp.asarray(rate) * m).astype(m.dtype), updates)
        return updates, State(task, kd, state.count + 1)

    return optax.GradientTransformation(init, update)


def _step(param, task, kd, task_buffer, kd_buffer, decayed, momentum, delta, weight_decay):
    """(sum of the buffers, the task's, the distillation's) of one leaf."""
    if task is None and kd is None:
        raise ValueError("dot: a parameter has neither a task nor a distillation gradient; pass zeros to keep it")
    decay = weight_decay * param if decayed else 0
    if kd is None:
        task_buffer = momentum * task_buffer + task + decay
    elif task is None:
        kd_buffer = momentum * kd_buffer + kd + decay
    else:
        task_buffer = (momentum - delta) * task_buffer + task + decay
        kd_buffer = (momentum + delta) * kd_buffer + kd
    return task_buffer + kd_buffer, task_buffer, kd_buffer
