"""Values of the step in the model state: seen by the loss and the evaluation, kept by nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core import experiment as engine
from research.core.scheduled import scheduled

BATCH = {"x": jnp.ones(4), "mask": jnp.ones(4)}


def made():
    """The value seen is the gradient, the new model state and a metric."""

    def init(key):
        return {"w": jnp.zeros(())}, {"net": {"norm": {"count": jnp.zeros(())}, "empty": {}}}

    def loss(params, model_state, batch, context):
        seen = model_state["net"]["schedule"]["slope"]
        net = {**model_state["net"], "norm": {"count": model_state["net"]["norm"]["count"] + seen}}
        return params["w"] * seen, engine.Output({**model_state, "net": net}, {"seen": engine.scalar(seen)})

    def evaluate(params, model_state, batch, frozen):
        return {"seen": engine.scalar(model_state["net"]["schedule"]["slope"])}

    return engine.supervised(init, loss, evaluate, optax.sgd(1.0), ema=(0.5,))


def test_each_step_sees_its_value_and_the_state_holds_none():
    found = scheduled(made(), lambda step: {"net": {"schedule": {"slope": step.astype(jnp.float32)}}})
    state = start = found.init(jax.random.PRNGKey(0))
    train, evaluate = jax.jit(found.train_step), jax.jit(found.eval_step)
    for step in range(3):
        state, metrics = train(state, BATCH)
        assert float(metrics["seen"][0]) == step
        # The evaluation after a step has the value of that step, and so have the moving averages.
        assert {name: float(total) for name, (total, _) in evaluate(state, BATCH).items()} == {
            "seen": step,
            "ema0.5/seen": step,
        }
        assert jax.tree.structure(state) == jax.tree.structure(start)
    np.testing.assert_allclose((state.params["w"], state.model_state["net"]["norm"]["count"]), (-3.0, 3.0))
    assert train._cache_size() == evaluate._cache_size() == 1
    assert float(evaluate(start, BATCH)["seen"][0]) == 0.0
