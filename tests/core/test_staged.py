"""Experiments that take over from each other: the right one at every step, in one program, from any step on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import experiment as engine
from research.core import loop, optim, runner
from research.core.checkpoint import Checkpoints
from research.core.staged import staged

PARTS = (2, 4, 8)  # how many of 8 entries the loss of each stage sees


def made(part: int) -> engine.Experiment:
    def init(key):
        return {"w": jax.random.normal(key, (8,))}, {}

    def loss(params, model_state, batch, context):
        noise = jax.random.normal(context.key, (part,))  # a shape of the stage's own
        value = jnp.mean(batch["x"][:, :part] @ (params["w"][:part] * noise)) + jnp.sum(params["w"][:part] ** 2)
        return value, engine.Output(model_state, {"loss": engine.scalar(value)})

    evaluate = lambda *_: {"part": engine.scalar(part)}
    return engine.supervised(init, loss, evaluate, optim.optimizer("adamw", 0.1))


def whole() -> engine.Experiment:
    return staged(made(8), [(3, made(2)), (5, made(4))])


def batches(first):
    while True:
        yield {"x": jax.random.normal(jax.random.PRNGKey(first), (8, 8)), "mask": jnp.ones(8)}
        first += 1


def trained(steps: int, devices: int = 1, mode: str = "jit", checkpoints=None):
    bound = runner.build(whole(), mode=mode, devices=jax.devices()[:devices])
    plan = loop.Plan(steps, 8)
    state, found = loop.fit(
        bound,
        plan,
        key=jax.random.PRNGKey(0),
        train_batches=batches,
        eval_batches=lambda: iter([next(batches(0))]),
        checkpoints=checkpoints,
    )
    return bound.canonical(state), found, bound


@pytest.fixture(scope="module")
def straight():
    return trained(7)


def test_every_step_is_that_of_its_stage(straight):
    alone = {part: jax.jit(made(part).train_step) for part in PARTS}
    state, stages, data = made(8).init(jax.random.PRNGKey(0)), [], batches(0)
    together, step = state, jax.jit(whole().train_step)
    for index in range(7):
        batch = next(data)
        state, _ = alone[2 if index < 3 else 4 if index < 5 else 8](state, batch)
        together, metrics = step(together, batch)
        stages.append(int(metrics["stage"][0]))
        np.testing.assert_allclose(together.params["w"], state.params["w"], rtol=1e-6)
    assert stages == [0, 0, 0, 1, 1, 2, 2] and step._cache_size() == 1
    np.testing.assert_allclose(straight[0].params["w"], state.params["w"], rtol=1e-6)
    assert straight[1] == {"part": 8.0}  # evaluation is the last one's


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_stopped_within_a_stage_continues_bit_for_bit(stop, straight, tmp_path):
    for steps in (stop, 7):
        checkpoints = Checkpoints(tmp_path)
        state, *_ = trained(steps, checkpoints=checkpoints)
        checkpoints.close()
    np.testing.assert_array_equal(state.params["w"], straight[0].params["w"])
    assert int(state.step) == 7


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_eight_devices_train_the_same(mode, straight):
    state, *_ = trained(7, 8, mode)
    np.testing.assert_allclose(state.params["w"], straight[0].params["w"], rtol=1e-5)


def test_stages_ascend():
    last = made(8)
    assert staged(last, []) is last
    for ends in ((0,), (3, 3), (5, 2)):
        with pytest.raises(ValueError, match="ascend from 1"):
            staged(last, [(end, made(2)) for end in ends])
