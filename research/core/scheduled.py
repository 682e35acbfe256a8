"""Quantities that a schedule sets and a network reads, such as the slope of an activation, as values of the step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.core.experiment import Experiment, State

Tree = Mapping[str, Any]


def scheduled(made: Experiment, values: Callable[[jax.Array], Tree]) -> Experiment:
    """`made`, whose networks find values of the step among the variables of their model state.

    The values are there while a step is computed and nowhere else: states, checkpoints and exported weights do not hold
    them, so a run continues right after any restart. They are traced, so one compiled step serves all of them. Moving
    averages are evaluated with the same values as the parameters themselves.

    Args:
      made: the experiment.
      values: step (() int32) -> nested dict that is laid over `State.model_state`, such as
        `{"student": {"model": {"schedule": {"slope": ...}}}}`. Training sees the step it takes, evaluation the last one
        taken.
    """

    def train_step(state: State, batch):
        new, metrics = made.train_step(_with(state, values(state.step)), batch)
        averages = {name: _like(new.ema[name], state.ema[name]) for name in state.ema}
        return new.replace(model_state=_like(new.model_state, state.model_state), ema=averages), metrics

    def eval_step(state: State, batch):
        return made.eval_step(_with(state, values(jnp.maximum(state.step - 1, 0))), batch)

    return made._replace(train_step=train_step, eval_step=eval_step)


def _with(state: State, values: Tree) -> State:
    laid = lambda part: {**part, "model_state": _over(part["model_state"], values)}
    averages = {name: laid(average) for name, average in state.ema.items()}
    return state.replace(model_state=_over(state.model_state, values), ema=averages)


def _over(tree: Tree, values: Tree) -> dict:
    """`tree` with the leaves of `values` added or replaced."""
    merged = dict(tree)
    for name, value in values.items():
        merged[name] = _over(tree.get(name, {}), value) if isinstance(value, Mapping) else value
    return merged


def _like(tree: Any, pattern: Any) -> Any:
    """The part of `tree` that has the keys of `pattern`."""
    if not isinstance(pattern, Mapping):
        return tree
    return {name: _like(tree[name], inner) for name, inner in pattern.items()}
