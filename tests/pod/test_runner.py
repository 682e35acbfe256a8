"""One device, data-parallel, fsdp, tensor and pmap runs take the same path, batch norm and relations included."""

import functools

import jax
import numpy as np
import pytest

from research.core import runner, scope, sharding
from tests.pod import toy

STEPS = 20
# Equal mathematics, other order of summation: a few units in the last place, grown over 20 steps of momentum.
TOLERANCE = 2e-5
LAYOUTS = {
    "data": dict(axes={"data": 8}),
    "fsdp": dict(axes={"fsdp": 8}, rules=[(".*", "fsdp")]),
    "tensor": dict(
        axes={"data": 2, "tensor": 4}, rules=[("Conv_1/kernel", "tensor:-1"), ("Dense_0/kernel", "tensor:0")]
    ),
    "fsdp and tensor": dict(axes={"fsdp": 4, "tensor": 2}, rules=[("Conv_1/kernel", "fsdp+tensor:-1"), (".*", "fsdp")]),
    "pmap": dict(mode="pmap"),
}


def losses(layout: dict, **options) -> np.ndarray:
    run = runner.build(toy.build(**options), **layout)
    state, batches, found = run.init(jax.random.PRNGKey(0)), toy.batches(0), []
    for _ in range(STEPS):
        state, metrics = run.train_step(state, run.put(next(batches)))
        found.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return np.asarray(found)


@functools.cache
def alone(**options) -> np.ndarray:
    return losses(dict(axes={"data": 1}, devices=jax.devices()[:1]), **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_device(layout):
    np.testing.assert_allclose(losses(LAYOUTS[layout]), alone(), rtol=TOLERANCE)


@pytest.mark.parametrize("layout", ["data", "pmap"])
@pytest.mark.parametrize("options", [dict(group=2), dict(accumulate=2)], ids=str)
def test_groups_and_accumulation_mean_the_same_everywhere(layout, options):
    reference = alone(**options)
    assert np.max(np.abs(reference - alone())) > 1e-3  # the option does something
    np.testing.assert_allclose(losses(LAYOUTS[layout], **options), reference, rtol=TOLERANCE)


def test_the_toy_learns():
    assert alone()[-1] < 0.75 * alone()[0]


def test_rules_really_split_parameters_moments_and_averages():
    state = runner.build(toy.build(), **LAYOUTS["fsdp"]).init(jax.random.PRNGKey(0))
    split = [path for path, leaf in sharding.paths(state) if leaf.addressable_shards[0].data.size * 8 == leaf.size]
    for place in ("params/", "opt_state/", "ema/"):
        assert any(path.startswith(place) and path.endswith("Conv_1/kernel") for path in split), place


@pytest.mark.parametrize("layout", ["data", "pmap"])
def test_indivisible_batch_is_refused(layout):
    run = runner.build(toy.build(), **LAYOUTS[layout])
    batch = {name: value[:12] for name, value in next(toy.batches(0)).items()}
    with pytest.raises(ValueError, match="batch_size 12 is not divisible by the 8 devices"):
        run.put(batch)


def test_pmap_refuses_model_axes_and_unknown_modes():
    with pytest.raises(ValueError, match="data parallel only"):
        runner.build(toy.build(), mode="pmap", axes={"fsdp": 8})
    with pytest.raises(ValueError, match="'pjit' is neither 'jit' nor 'pmap'"):
        runner.build(toy.build(), mode="pjit")


def test_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a batch of 16 examples does not divide into groups of 3"):
        scope.by_group(lambda x: x.sum(), 3, np.zeros((16, 2)))


def test_pretrained_weights_replace_part_of_the_state():
    experiment = toy.build()
    bias = np.arange(toy.CLASSES, dtype=np.float32)
    loaded = experiment._replace(weights=lambda: {"params": {"Dense_0": {"bias": bias}}})
    for layout in (LAYOUTS["data"], LAYOUTS["pmap"]):
        run = runner.build(loaded, **layout)
        state = run.canonical(run.init(jax.random.PRNGKey(0)))
        np.testing.assert_array_equal(state.params["Dense_0"]["bias"], bias)
        assert np.any(np.asarray(state.params["Dense_0"]["kernel"]))
    wrong = experiment._replace(weights=lambda: {"params": {"Dense_0": {"bias": bias[:2]}}})
    with pytest.raises(ValueError, match=r"pretrained params/Dense_0/bias has shape \(2,\), the model wants \(4,\)"):
        runner.build(wrong).init(jax.random.PRNGKey(0))


def test_the_cheaper_code_of_the_start_makes_the_same_bits(monkeypatch):
    made, key, one = toy.build(), jax.random.PRNGKey(3), dict(axes={"data": 1}, devices=jax.devices()[:1])
    monkeypatch.delenv("XLA_FLAGS")  # with a level in it, the user's, none is chosen
    cheap = runner.build(made, **one).init(key)
    full = jax.jit(made.init, compiler_options={"xla_backend_optimization_level": 3})(key)
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(cheap), jax.device_get(full)))
