"""An experiment is three pure functions; the engine runs any of them.

    init(key) -> state
    train_step(state, batch) -> (state, metrics)
    eval_step(state, batch) -> metrics

`state` is one pytree, `batch` a dict of arrays with a leading batch axis and a `mask` of real examples, `metrics` a
dict of (sum, count) pairs, so that sharded and padded evaluation is exact. Randomness is `fold_in(state.key, step)`:
step N draws the same numbers after any restart.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from research.core import optim, scope

Metrics = dict[str, tuple[jax.Array, jax.Array]]
Batch = dict[str, jax.Array]


@struct.dataclass
class State:
    """Everything a run needs to continue.

    Attributes:
      step: () int32, optimiser steps taken.
      key: (2,) uint32, the root of all randomness.
      params: trained parameters.
      model_state: what the forward pass updates without gradients (batch statistics, memory banks).
      opt_state: state of the optimiser.
      ema: {name: {"params", "model_state"}} exponential moving averages; {} without.
      frozen: variables that are never trained (a teacher); not checkpointed, rebuilt by `init`.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    frozen: Any


def _export(state: State) -> dict[str, Any]:
    return {"model": {"params": state.params, **state.model_state}}


class Experiment(NamedTuple):
    """Three pure functions, and how weights come in and go out.

    `weights()` runs on the host, outside any trace (large arrays would become constants of the program): it returns
    {field of State: nested dict of arrays}, any part of it, to put in place of what `init` made. `export(state)` names
    the trained models' variables, {name: {"params": ..., ...}}, for files of weights; `costs()` gives
    {network: {"params", "macs"}} of one example's forward pass, with `frozen` True where it is not trained.
    """

    init: Callable[[jax.Array], State]
    train_step: Callable[[State, Batch], tuple[State, Metrics]]
    eval_step: Callable[[State, Batch], Metrics]
    weights: Callable[[], Mapping[str, Any]] = dict
    export: Callable[[State], Mapping[str, Any]] = _export
    costs: Callable[[], Mapping[str, dict[str, int]]] = dict


class Context(NamedTuple):
    """What a loss may use beside parameters and batch.

    Attributes:
      frozen: variables that are never trained.
      key: randomness of this step (and micro-batch).
      step: () int32, steps taken before this one.
    """

    frozen: Any
    key: jax.Array
    step: jax.Array


class Output(NamedTuple):
    """What a loss returns beside its value: the new model state and metrics of (sum, count) pairs."""

    model_state: Any
    metrics: Metrics


def scalar(value) -> tuple[jax.Array, jax.Array]:
    """A quantity of the whole step as a (sum, count) pair."""
    return jnp.asarray(value, jnp.float32), jnp.ones((), jnp.float32)


def supervised(
    init: Callable[[jax.Array], tuple[Any, Any]],
    loss: Callable[[Any, Any, Batch, Context], tuple[jax.Array, Output]],
    evaluate: Callable[[Any, Any, Batch, Any], Metrics],
    optimizer: optax.GradientTransformation,
    *,
    parts: Sequence[str] = (),
    frozen: Callable[[jax.Array], Any] = lambda key: {},
    weights: Callable[[], Mapping[str, Any]] = dict,
    schedule: Callable[[jax.Array], jax.Array] | Mapping[str, Callable] | None = None,
    accumulate: int = 1,
    ema: tuple[float, ...] = (),
) -> Experiment:
    """The Experiment of a differentiable loss.

    Args:
      init: key -> (params, model_state).
      loss: (params, model_state, batch, Context) -> (scalar mean loss, Output).
      evaluate: (params, model_state, batch, frozen) -> metrics.
      optimizer: the gradient transformation; it contains clipping, decay and the learning-rate schedule.
      parts: names of the losses whose gradients the optimiser wants apart: `loss` then gives {part: scalar} and
        `optimizer.update` gets {part: gradients}, from one forward and a backward pass each.
      frozen: key -> variables that take part but are not trained.
      weights: pretrained values by field of State, see Experiment.
      schedule: step -> learning rate, or a mapping of several, only to be logged.
      accumulate: micro-batches a step; each holds consecutive examples, gradients and metrics are averaged.
      ema: decays of the moving averages kept and evaluated (one set of weights each).
    """
    schedules = schedule if isinstance(schedule, Mapping) else {"": schedule} if schedule else {}

    def init_state(key):
        init_key, frozen_key, key = jax.random.split(key, 3)
        # Python numbers make weakly typed leaves, which a step returns as strong ones: it would be compiled twice.
        strong = lambda x: jax.lax.convert_element_type(x, x.dtype)
        params, model_state = jax.tree.map(strong, init(init_key))
        # An average starts as a copy: the same buffer may not be donated twice.
        copied = lambda: jax.tree.map(jnp.copy, {"params": params, "model_state": model_state})
        averages = {f"ema{decay}": copied() for decay in ema}
        step = jnp.zeros((), jnp.int32)
        return State(step, key, params, model_state, optimizer.init(params), averages, frozen(frozen_key))

    def gradients(state, model_state, batch, key):
        def value(params):
            return loss(params, model_state, batch, Context(state.frozen, key, state.step))

        if not parts:
            (_, output), grads = jax.value_and_grad(value, has_aux=True)(state.params)
            return grads, output
        values, pull, output = jax.vjp(value, state.params, has_aux=True)
        one = lambda chosen: {part: jnp.full_like(x, part == chosen) for part, x in values.items()}
        return {part: pull(one(part))[0] for part in parts}, output

    def train_step(state, batch):
        key = jax.random.fold_in(state.key, state.step)
        if accumulate == 1:
            grads, output = gradients(state, state.model_state, batch, key)
        else:
            grads, output = _accumulated(gradients, state, batch, key, accumulate, parts)
        grads, model_state = scope.mean(grads), scope.mean(output.model_state)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = output.metrics | {
            "grad_norm": scalar(optax.tree.norm(_summed(grads, parts))),
            "update_norm": scalar(optax.tree.norm(updates)),
            "param_norm": scalar(optax.tree.norm(params)),
        }
        for name, function in schedules.items():
            metrics[f"lr/{name}" if name else "lr"] = scalar(function(state.step))
        new = {"params": params, "model_state": model_state}
        averages = {f"ema{d}": optim.ema_update(state.ema[f"ema{d}"], new, d) for d in ema}
        state = state.replace(step=state.step + 1, opt_state=opt_state, ema=averages, **new)
        return state, metrics

    def eval_step(state, batch):
        metrics = evaluate(state.params, state.model_state, batch, state.frozen)
        for name, average in state.ema.items():
            found = evaluate(average["params"], average["model_state"], batch, state.frozen)
            metrics |= {f"{name}/{key}": value for key, value in found.items()}
        return metrics

    return Experiment(init_state, train_step, eval_step, weights)


def _summed(gradients, parts):
    return jax.tree.map(lambda *found: sum(found), *(gradients[part] for part in parts)) if parts else gradients


def _accumulated(gradients, state, batch, key, count, parts):
    """Mean gradients and summed metrics over `count` micro-batches of consecutive examples, one after the other."""
    whole = scope.gather(batch)
    size = jax.tree.leaves(whole)[0].shape[0]
    if size % count:
        raise ValueError(f"batch_size {size} does not divide into parallel.accumulate={count} micro-batches")
    micro = jax.tree.map(lambda x: x.reshape(count, size // count, *x.shape[1:]), whole)

    def body(carry, inputs):
        total, model_state = carry
        part, index = inputs
        grads, output = gradients(state, model_state, scope.local(part), jax.random.fold_in(key, index))
        return (jax.tree.map(jnp.add, total, grads), output.model_state), output.metrics

    zeros = jax.tree.map(jnp.zeros_like, dict.fromkeys(parts, state.params) if parts else state.params)
    (total, model_state), metrics = jax.lax.scan(body, (zeros, state.model_state), (micro, jnp.arange(count)))
    return jax.tree.map(lambda g: g / count, total), Output(model_state, jax.tree.map(lambda x: jnp.sum(x, 0), metrics))
