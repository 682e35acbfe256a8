"""Joining says what is missing; which errors mean that a process is lost."""

import pytest

from research.core import cluster
from research.core.errors import UserError


@pytest.fixture
def environment(monkeypatch):
    for name in (cluster.ADDRESS, cluster.COUNT, cluster.INDEX):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_what_is_missing_is_named(environment):
    environment.setenv(cluster.COUNT, "2")
    with pytest.raises(UserError, match="--distributed: JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID must be set too"):
        cluster.join()
    environment.setenv(cluster.INDEX, "first")
    with pytest.raises(UserError, match="JAX_PROCESS_ID: 'first' is not a number"):
        cluster.join()


@pytest.mark.parametrize(
    "text",
    [
        "UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [10.0.0.2]:24998",
        "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)",
        "DEADLINE_EXCEEDED: Barrier timed out",
    ],
)
def test_errors_of_a_lost_process(text):
    assert cluster.lost(RuntimeError(text))


def test_other_errors_are_bugs():
    assert not cluster.lost(ValueError("loss became nan at step 12"))


def test_guard_leaves_errors_alone_in_a_single_process():
    with pytest.raises(RuntimeError, match="UNAVAILABLE"), cluster.guard():
        raise RuntimeError("UNAVAILABLE: of a store")
