"""Traces of real steps, read back: the operations of a known program are found, with kind and origin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import profile, runner
from research.core.errors import UserError
from tests.pod import toy


def test_steps_are_parsed_or_refused():
    assert profile.parse("20:24") == (20, 24) and profile.parse("3") == (3, 3)
    for text in ("0:3", "5:4", "x", "1:2:3", ""):
        with pytest.raises(UserError, match="write FIRST:LAST"):
            profile.parse(text)


def test_instructions_tell_kind_and_origin():
    def model(x, w):
        with jax.named_scope("stage1"):
            return jnp.sum(jnp.tanh(x @ w))

    x, w = jnp.ones((64, 64)), jnp.ones((64, 64))
    program = jax.jit(jax.grad(model, argnums=1)).lower(x, w).compile().as_text()
    found = list(profile.instructions(program).values())
    assert ("dot", "stage1/dot_general") in found
    assert any(kind == "dot" and where.startswith("backward stage1") for kind, where in found)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Six steps of the toy experiment, of which 3 to 5 are traced; and the same without a trace."""
    folder = tmp_path_factory.mktemp("run")
    plain = runner.build(toy.build())
    states = []
    for run in (plain, profile.traced(plain, profile.Steps(3, 5), folder)):
        state, batches = run.init(jax.random.PRNGKey(0)), toy.batches(0)
        for _ in range(6):
            batch = run.put(next(batches))
            with jax.transfer_guard("disallow"):
                state, _ = run.train_step(state, batch)
        states.append(jax.device_get(state.params))
    return folder, states


def test_tracing_changes_nothing(traced):
    jax.tree.map(np.testing.assert_array_equal, *traced[1])


def test_the_trace_holds_its_steps_and_the_summary_its_operations(traced):
    folder = traced[0] / profile.FOLDER
    (trace,) = [file for file in folder.rglob("*.xplane.pb")]
    ops = {op.name: op for op in profile.operations(trace)}
    reduced = [op for op in ops.values() if op.kind == "all-reduce"]
    assert reduced and all(op.count == 3 * jax.device_count() * round(op.count / 24) for op in reduced)
    text = (folder / profile.SUMMARY).read_text()
    assert text.startswith("3 steps,") and "all-reduce" in text
    assert "backward Net/Conv_1" in text


def test_summary_adds_up():
    ops = [profile.Op("a.1", "dot", "x", 0.03, 6), profile.Op("b", "copy", "", 0.01, 6)]
    text = profile.summary(ops, seconds=0.06, steps=3, devices=2)
    assert "3 steps, 20.000 ms each; 2 local devices, busy 6.667 ms a step" in text
    assert "5.000   75.0      1  a.1  x" in text and "1.667   25.0  copy" in text
