"""Which checkpoints are kept, and by which evaluation they are ranked."""

import jax
import pytest

from research.core import loop, runner
from research.core.checkpoint import Checkpoints
from tests.pod import toy


@pytest.fixture(scope="module")
def bound():
    return runner.build(toy.build(ema=()), devices=jax.devices()[:1])


def steps(folder) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def test_best_and_last_are_kept(bound, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, metric="top1")
    state, batches = bound.init(jax.random.PRNGKey(0)), toy.batches(0)
    for value in (0.2, 0.9, 0.3, 0.4):
        state, _ = bound.train_step(state, bound.put(next(batches)))
        checkpoints.save(bound.canonical(state), loop.Progress(), {"top1": value})
    checkpoints.close()
    assert steps(tmp_path) == [2, 4]


def test_a_checkpoint_is_ranked_by_its_own_evaluation_alone(bound, tmp_path, monkeypatch):
    """Saved every step and evaluated every second: the steps between must not inherit the earlier value."""
    seen = {}
    save = Checkpoints.save

    def spy(self, state, progress, metrics=None, **options):
        seen[int(state.step)] = metrics
        save(self, state, progress, metrics, **options)

    monkeypatch.setattr(Checkpoints, "save", spy)
    checkpoints = Checkpoints(tmp_path, keep=1, metric="top1")
    plan = loop.Plan(4, toy.BATCH, eval_every=2, save_every=1)
    loop.fit(
        bound,
        plan,
        key=jax.random.PRNGKey(0),
        train_batches=toy.batches,
        eval_batches=lambda: [next(toy.batches(0))],
        checkpoints=checkpoints,
    )
    checkpoints.close()
    assert {step: metrics is not None for step, metrics in seen.items()} == {1: False, 2: True, 3: False, 4: True}
