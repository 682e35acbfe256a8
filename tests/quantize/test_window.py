"""Windows of blocks whose rounding is learned: what a loss is made of, what learning does to it, and what comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.quantize import window
from research.quantize.grids import Form
from research.quantize.quantized import dequantize, quantize
from research.quantize.rounding import temperature
from research.quantize.window import Scheme

WIDTH, HIDDEN, STEPS = 16, 24, 300
FORM = Form(2, group=8)
SCHEMES = {"up": Scheme(FORM, inputs=8), "down": Scheme(FORM)}


def block(weights, x, enter):
    y = jax.nn.relu(jnp.einsum("bnc,ch->bnh", enter("up", x), weights["up"]) + weights["bias"][None, None])
    return x + jnp.einsum("bnh,hc->bnc", enter("down", y), weights["down"])


def drawn(seed):
    rng = np.random.default_rng(seed)
    shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "bias": (HIDDEN,)}
    return {name: jnp.float32(rng.normal(0, 0.25, shape)) for name, shape in shapes.items()}


BLOCKS, WEIGHTS = [block, block], [drawn(0), drawn(1)]
EXACT = jnp.float32(np.random.default_rng(2).normal(size=(8, 3, WIDTH)))
ROUGH = EXACT + 0.1 * jnp.float32(np.random.default_rng(3).normal(size=EXACT.shape))
RANGES = {"up": jnp.float32(4.0)}


def begun(nearest=True, rank=5):
    keys = jax.random.split(jax.random.key(0), 2)
    parts = [window.start(w, SCHEMES, RANGES, key, rank, nearest) for w, key in zip(WEIGHTS, keys, strict=True)]
    return [learned for learned, _ in parts], [fixed for _, fixed in parts]


SETTINGS = {"blocks": BLOCKS, "schemes": [SCHEMES, SCHEMES]}
loss = jax.jit(functools.partial(window.window_loss, **SETTINGS))
run = jax.jit(functools.partial(window.run_quantized, BLOCKS, schemes=[SCHEMES, SCHEMES]))


@pytest.fixture(scope="module")
def wanted():
    return jax.jit(functools.partial(window.targets, BLOCKS, WEIGHTS))(EXACT, ROUGH)


@pytest.fixture(scope="module")
def trained(wanted):
    """What is learned after some steps on one batch, and the losses on the way."""
    rule = window.optimizer(STEPS, factors=1e-2)
    step = jax.jit(functools.partial(window.update, rule=rule, **SETTINGS))
    learned, fixed = begun()
    moments, totals = rule.init(learned), []
    for index in range(STEPS):
        decide = jnp.float32(1e-3 if index >= 0.2 * STEPS else 0)
        beta = jnp.float32(temperature(index, STEPS))
        learned, moments, parts = step(learned, moments, fixed, ROUGH, wanted, beta, weight=decide)
        totals.append(parts["total"])
    return learned, fixed, totals


def test_learning_starts_where_nothing_is_rounded_and_ends_at_nearest():
    """v0 adds back what rounding down cuts off; decided for good, it is rounding to nearest."""
    learned, fixed = begun()
    for own, rest, weights in zip(learned, fixed, WEIGHTS, strict=True):
        assert set(own.steps) == {"up", "down"} and set(own.inputs) == {"up"}
        for name, q in window.finish(own, rest, SCHEMES).items():
            expected = quantize(weights[name], FORM)
            np.testing.assert_array_equal(q.scales, expected.scales)
            error = np.abs(dequantize(expected) - weights[name])
            np.testing.assert_allclose(np.abs(dequantize(q) - weights[name]), error, atol=1e-6)  # halves go either way
            off = np.abs(window._soft(name, own, rest, FORM) - weights[name])
            within = (q.codes > 0) & (q.codes < 3)
            assert np.max(off[within]) < 1e-6 and np.all(off <= error + 1e-6)


def test_the_papers_form_adds_a_half_everywhere():
    learned, fixed = begun(nearest=False)
    assert all(jnp.all(v == 0) for rest in fixed for v in rest.v0.values())
    _, parts = loss(learned, fixed, ROUGH, (ROUGH, ROUGH), 2.0)
    np.testing.assert_allclose(parts["com"], 2 * 2 * WIDTH * HIDDEN)  # nothing is decided


def test_branches_differ_by_their_input(wanted):
    """Both branches ask for unquantised outputs: of their own input, that without and that with earlier errors."""
    learned, fixed = begun()
    total, parts = loss(learned, fixed, ROUGH, wanted, 4.0, weight=0.5)
    np.testing.assert_allclose(total, parts["rec"] + parts["homologous"] + 0.5 * parts["com"], rtol=1e-6)
    assert parts["rec"] > 1.2 * parts["homologous"]
    _, same = loss(learned, fixed, ROUGH, (wanted[1], wanted[1]), 4.0)
    np.testing.assert_allclose(same["rec"], same["homologous"])


def test_learned_rounding_beats_rounding_to_nearest(trained, wanted):
    learned, fixed, totals = trained
    start, _ = begun()
    errors = []
    for state in (start, learned):
        done = [window.finish(own, rest, SCHEMES) for own, rest in zip(state, fixed, strict=True)]
        weights = [
            {**rest.weights, **{name: dequantize(q) for name, q in arrays.items()}}
            for rest, arrays in zip(fixed, done, strict=True)
        ]
        y = window.run(BLOCKS, weights, ROUGH)
        errors.append(sum(float(jnp.mean((y - target) ** 2)) for target in wanted))
    assert errors[1] < 0.75 * errors[0], errors
    assert np.all(np.isfinite(totals)) and totals[STEPS // 5 - 1] < 0.6 * totals[0]


def test_every_kind_learns_at_its_own_rate():
    """Adam's first step is the rate whatever the gradient: a share of each step, and of factors the rate itself."""
    learned, _ = begun()
    rule = window.optimizer(10**9, weights=1e-2, inputs=1e-3, factors=1e-4)
    slopes = jax.tree.map(jnp.ones_like, learned)
    with jax.numpy_dtype_promotion("standard"):
        changes, _ = rule.update(slopes, rule.init(learned), learned)
    for change, own in zip(changes, learned, strict=True):
        jax.tree.map(lambda c, s: np.testing.assert_allclose(c, -1e-2 * s, rtol=1e-4), change.steps, own.steps)
        jax.tree.map(lambda c, s: np.testing.assert_allclose(c, -1e-3 * s, rtol=1e-4), change.inputs, own.inputs)
        jax.tree.map(lambda c: np.testing.assert_allclose(c, -1e-4, rtol=1e-4), change.factors)


def test_the_end_of_learning_is_the_limit_of_the_soft_rounding(trained):
    """Pushed to either end, the soft rounding computes what the arrays of few bits hold."""
    learned, fixed, _ = trained
    decided = [
        rest._replace(v0={name: jnp.where(window._v(name, own, rest) >= 0, 9.0, -9.0) for name in rest.v0})
        for own, rest in zip(learned, fixed, strict=True)
    ]
    bare = [own._replace(factors=jax.tree.map(jnp.zeros_like, own.factors)) for own in learned]
    for own, rest, before, after in zip(bare, decided, learned, fixed, strict=True):
        for name, q in window.finish(before, after, SCHEMES).items():
            soft = window._soft(name, own, rest, FORM)
            np.testing.assert_allclose(dequantize(q), soft, rtol=1e-5, atol=1e-6)


def test_sharded_batches_give_the_same_output(trained):
    learned, fixed, _ = trained
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    sharded = jax.device_put(ROUGH, NamedSharding(mesh, PartitionSpec("data")))
    arguments = {"learned": learned, "fixed": fixed}
    np.testing.assert_allclose(run(**arguments, x=sharded), run(**arguments, x=ROUGH), rtol=1e-5, atol=1e-5)


def test_what_is_refused():
    with pytest.raises(ValueError, match="the block has no weight 'gate', only bias, down, up"):
        window.start(WEIGHTS[0], {"gate": Scheme(FORM)}, {}, jax.random.key(0))
    with pytest.raises(ValueError, match="'up' has rule 'absmax'; learned rounding needs zero points"):
        window.start(WEIGHTS[0], {"up": Scheme(Form(4, rule="absmax"))}, {}, jax.random.key(0))
