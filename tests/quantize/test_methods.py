"""Published baselines on blocks of tiny models: what a search picks, what learning does, what folding leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import language
from research.language import llama, opt
from research.quantize import methods
from research.quantize.calibration import UNTOUCHED, Outcome, Problem, observe
from research.quantize.fake import learnable_clip
from research.quantize.grids import Form
from research.quantize.methods import awq, omniquant
from research.quantize.quantized import Quantized, dequantize
from research.quantize.rules import Rule
from research.quantize.sequence import Blocks, folded, kernel

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = llama.build(**SIZES, intermediate_size=64)
OPT = opt.build(**SIZES, ffn_dim=64, max_position_embeddings=16)
OUTLIERS = np.arange(32) % 13 == 5


def problem_of(model, rule, outlier=12):
    """The first block, larger kernels and norms with outliers than those of an untrained model, other biases than 0."""
    rng, blocks = np.random.default_rng(0), Blocks(model)
    params = jax.device_get(jax.jit(lambda: language.init(model, jax.random.key(0)))()["params"])
    weights = {}
    for path, w in sorted(blocks.own(params, 0).items()):
        noise = np.float32(rng.standard_normal(w.shape))
        kind = path.split("/")[-1]
        weights[path] = jnp.float32(
            5 * w
            if kind == "kernel"
            else 0.1 * noise
            if kind == "bias"
            else np.where(OUTLIERS, outlier, 1) * (1 + 0.2 * noise)
        )
    tokens = rng.integers(0, 64, (8, 16))
    x, shared = jax.jit(blocks.start)({name: w for name, w in params.items() if not name.startswith("layers_")}, tokens)
    exact = 20 * np.asarray(x)
    rough = exact + 0.005 * np.float32(rng.standard_normal(exact.shape))
    schemes = blocks.schemes((rule,), 0)
    return Problem(blocks, 0, [weights], [schemes], exact, rough, shared, [None], jax.random.key(1), 8)


def through(problem, weights, x, steps=None):
    """What leaves the block; inputs are rounded where kernels are."""
    few = any(isinstance(w, Quantized) for w in weights.values())
    return observe(problem.blocks, weights, x, problem.shared, problem.schemes[0] if few else UNTOUCHED, steps)[0]


def error(problem, outcome: Outcome):
    """Mean squared difference to the unquantised block's output from the exact input."""
    wanted = through(problem, problem.weights[0], problem.exact)
    return float(jnp.mean(jnp.square(through(problem, outcome.weights, problem.rough, outcome.steps) - wanted)))


def solved(problem, method):
    (outcome,) = method(problem)
    return outcome


@pytest.fixture(scope="module")
def three():
    """LLaMA's first block at 3 bits in groups by AWQ's grid."""
    return problem_of(LLAMA, Rule("", bits=3, group=16, rule="awq"))


@pytest.fixture(scope="module")
def seen(three):
    """What enters the block's kernels."""
    run = jax.jit(lambda x: observe(three.blocks, three.weights[0], x, three.shared, reduce=lambda _, seen: seen)[1])
    return jax.device_get(run(three.exact))


@pytest.mark.parametrize("model", [LLAMA, OPT], ids=["llama", "opt"])
def test_folds_leave_what_a_block_computes_as_it_is(model):
    problem = problem_of(model, Rule("", bits=4))
    (weights,), rng = problem.weights, np.random.default_rng(1)
    folds = problem.blocks.folds(weights)
    assert folds == problem.blocks.plan.folds
    before = through(problem, weights, problem.exact)
    for fold in folds:
        factors = jnp.float32(rng.uniform(0.3, 3, len(weights[kernel(fold.readers[0])])))
        weights = folded(weights, fold, factors)
    np.testing.assert_allclose(through(problem, weights, problem.exact), before, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("model", "unlawful"),
    [
        (LLAMA.clone(num_key_value_heads=1), {"self_attn/v_proj"}),
        (OPT.clone(do_layer_norm_before=False), {"self_attn_layer_norm", "final_layer_norm"}),
        (OPT.clone(layer_norm_elementwise_affine=False), {"self_attn_layer_norm", "final_layer_norm"}),
        (OPT.clone(activation_function="gelu"), {"fc1"}),
    ],
    ids=["shared heads", "norms after the addition", "norms without scales", "gelu"],
)
def test_only_folds_that_change_nothing_are_taken(model, unlawful):
    blocks = Blocks(model)
    params = jax.eval_shape(lambda: language.init(model, jax.random.key(0)))["params"]
    lawful = {fold.maker for fold in blocks.folds(blocks.own(params, 0))}
    assert {fold.maker for fold in blocks.plan.folds} - lawful == unlawful


def test_smoothquant_beats_rounding_where_channels_have_outliers():
    problem = problem_of(LLAMA, Rule("", bits=8, rule="absmax", activation_bits=8))
    problem = dataclasses.replace(problem, rough=problem.exact)
    smooth = solved(problem, methods.build("smoothquant"))
    exact = {path: w for path, w in smooth.weights.items() if not isinstance(w, Quantized)}
    assert {path for path in exact if not np.array_equal(exact[path], problem.weights[0][path])} == {
        "input_layernorm/scale",
        "post_attention_layernorm/scale",
    }
    assert error(problem, smooth) < 0.8 * error(problem, solved(problem, methods.build("rtn")))


def awq_rounded(w, bits=3, group=16):
    """The official grid, for a kernel (K, N)."""
    parts = w.astype(np.float64).reshape(-1, group, w.shape[1])
    low, high = parts.min(1, keepdims=True), parts.max(1, keepdims=True)
    scale = np.maximum(high - low, 1e-5) / (2**bits - 1)
    zero = np.clip(-np.round(low / scale), 0, 2**bits - 1)
    return ((np.clip(np.round(parts / scale) + zero, 0, 2**bits - 1) - zero) * scale).reshape(w.shape)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("maker", ["mlp/up_proj", "post_attention_layernorm"])
def test_awq_takes_the_ratio_with_the_least_error(three, seen, maker):
    """All 20 tried here one by one, for a layer and for the gated MLP."""
    weights = {path: np.float64(w) for path, w in three.weights[0].items()}
    gate, up, down = (weights[f"mlp/{name}_proj/kernel"] for name in ("gate", "up", "down"))
    x = np.float64(seen["mlp/down_proj/kernel" if maker == "mlp/up_proj" else "mlp/gate_proj/kernel"]).reshape(128, -1)

    def module(quantise):
        return x @ quantise(down) if maker == "mlp/up_proj" else (silu(x @ quantise(gate)) * (x @ quantise(up))) @ down

    errors, scales = [], []
    for ratio in range(20):
        s = np.maximum(np.abs(x).mean(0) ** (ratio / 20), 1e-4)
        scales.append(s / np.sqrt(s.max() * s.min()))
        off = module(lambda w: awq_rounded(w * scales[-1][:, None]) / scales[-1][:, None]) - module(lambda w: w)
        errors.append(np.mean(off**2))
    (found,) = [s for fold, s in awq.Awq().scales(three).items() if fold.maker == maker]
    assert 0 < np.argmin(errors)
    np.testing.assert_allclose(found, scales[np.argmin(errors)], rtol=1e-4)


def test_awq_cuts_each_group_where_its_product_errs_least(three, seen):
    w, x = (np.float64(a["mlp/down_proj/kernel"]) for a in (three.weights[0], seen))
    x, parts = x.reshape(128, 4, 16), w.reshape(4, 16, -1)
    largest, best, least = np.abs(parts).max(1, keepdims=True), parts.copy(), np.full((4, 1, w.shape[1]), np.inf)
    for step in range(10):
        cut = np.clip(parts, -largest * (1 - step / 20), largest * (1 - step / 20))
        off = np.einsum("tgk,gkn->tgn", x, awq_rounded(cut.reshape(w.shape)).reshape(parts.shape) - parts)
        err = np.mean(off**2, axis=0)[:, None]
        best, least = np.where(err < least, cut, best), np.minimum(err, least)
    moment = jnp.float32(np.einsum("tgk,tgl->gkl", x, x))
    found = awq.clipped(jnp.float32(w), moment, form=Form(3, group=16, rule="awq"))
    same = np.isclose(found, best.reshape(w.shape), rtol=1e-5, atol=1e-6)
    assert np.mean(same) > 0.99  # ranges cut on both sides have zero points on exact halves
    assert not np.allclose(best, parts)


def test_awq_samples_tokens_evenly_over_texts(three):
    """In two batches as in one."""
    x = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(np.float32)
    for sizes in ([5], [2, 3]):
        state, start = (jnp.int32(0), jnp.int32(4), {"w": jnp.zeros((2, 2, 2))}), 0
        for size in sizes:
            state, start = awq._add_moments(state, {"w": x[start : start + size]}), start + size
        rows = x.reshape(15, 2, 2)[::4]
        np.testing.assert_allclose(state[2]["w"], np.einsum("tgk,tgl->gkl", rows, rows), rtol=1e-5)


def test_awq_beats_rounding_to_nearest_and_clipping_helps(three):
    floor = error(three, Outcome(three.weights[0], {}))
    nearest, scaled, both = (error(three, solved(three, methods.build(m))) for m in ("rtn", "awq:clip=no", "awq"))
    assert floor < both < scaled < nearest
    queries = solved(three, awq.Awq()).weights
    without = solved(three, awq.Awq(clip=False)).weights
    same = {path for path in three.schemes[0] if np.array_equal(queries[path].codes, without[path].codes)}
    assert same == {"self_attn/q_proj/kernel", "self_attn/k_proj/kernel"}


def test_transformations_leave_what_a_block_computes_as_it_is():
    """Shifts too, of norms and of values, where OPT has biases for them."""
    problem, rng = problem_of(OPT, Rule("", bits=4)), np.random.default_rng(1)
    (weights,), folds = problem.weights, problem.blocks.folds(problem.weights[0])[:3]
    draw = lambda low, high: {fold.maker: jnp.float32(rng.uniform(low, high, 32)) for fold in folds}
    changed = omniquant.transformed(weights, folds, draw(0.3, 3), draw(-1, 1))
    assert not np.allclose(changed["self_attn/o_proj/bias"], weights["self_attn/o_proj/bias"])
    before = through(problem, weights, problem.exact)
    np.testing.assert_allclose(through(problem, changed, problem.exact), before, rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def clipping():
    return problem_of(LLAMA, Rule("", bits=3, group=16, rule="omniquant"))


def test_omniquant_begins_at_rounding_to_nearest_of_clipped_kernels(clipping):
    nothing = solved(clipping, methods.build("omniquant:epochs=0,lwc=no")).weights
    jax.tree.map(np.testing.assert_array_equal, nothing, solved(clipping, methods.build("rtn")).weights)
    begun = solved(clipping, methods.build("omniquant:epochs=0")).weights
    for path, scheme in clipping.schemes[0].items():
        w = clipping.weights[0][path]
        four = jnp.full((len(w) // 16, w.shape[1]), 4.0)
        np.testing.assert_allclose(dequantize(begun[path]), learnable_clip(w, four, four, scheme.form), rtol=1e-5)


def test_omniquant_learns_to_clip_compiled_once_for_all_blocks(clipping):
    method = methods.build("omniquant:epochs=20,texts=4,lwc_rate=0.1")
    learned, nearest = solved(clipping, method), solved(clipping, methods.build("rtn"))
    compiled = omniquant._learn._cache_size()
    assert error(clipping, learned) < 0.9 * error(clipping, nearest)
    norms = [path for path in clipping.weights[0] if path.endswith("scale")]
    assert all(np.array_equal(learned.weights[path], clipping.weights[0][path]) for path in norms)
    other = {path: w[::-1] for path, w in clipping.weights[0].items()}
    solved(dataclasses.replace(clipping, first=1, weights=[other]), method)
    assert omniquant._learn._cache_size() == compiled


@pytest.mark.parametrize("model", [LLAMA, OPT], ids=["llama", "opt"])
def test_omniquant_learns_factors_and_shifts_where_inputs_are_rounded(model):
    problem = problem_of(model, Rule("", bits=4, activation_bits=4, rule="omniquant"))
    begun, learned = (solved(problem, methods.build(f"omniquant:epochs={epochs},texts=4")) for epochs in (0, 20))
    assert error(problem, learned) < 0.9 * error(problem, begun)
    assert error(problem, learned) < error(problem, solved(problem, methods.build("rtn")))
    moved = {path for path, w in learned.weights.items() if not np.array_equal(w, problem.weights[0][path])}
    biases = {path for path in problem.weights[0] if path.endswith("bias")}
    assert biases - moved == {path for path in biases if path.startswith("fc2")}


def test_omniquant_says_which_layer_has_a_grid_that_it_cannot_clip(three):
    with pytest.raises(ValueError, match="layers_0/.*_proj: OmniQuant needs rule omniquant .* not 'awq'"):
        methods.build("omniquant")(three)
    with pytest.raises(ValueError, match="let: 'yes' is none of inputs, always, never"):
        methods.build("omniquant:let=yes")


@pytest.fixture(scope="module")
def deciding():
    return problem_of(LLAMA, Rule("", bits=3, group=16), outlier=1)


@pytest.mark.parametrize("unit", ["block", "layer"])
def test_brecq_begins_at_nearest_and_decides_better(deciding, unit):
    nearest = solved(deciding, methods.build("rtn"))
    begun, learned = (
        solved(deciding, methods.build(f"brecq:iterations={n},texts=8,rate=0.05,decide=0.01,unit={unit}"))
        for n in (0, 100)
    )
    for path in deciding.schemes[0]:
        q, expected, w = begun.weights[path], nearest.weights[path], deciding.weights[0][path]
        np.testing.assert_array_equal(q.scales, expected.scales)
        np.testing.assert_allclose(abs(dequantize(q) - w), abs(dequantize(expected) - w), atol=1e-5)  # but for halves
        apart = np.abs(np.int32(learned.weights[path].codes) - np.int32(q.codes))
        assert apart.max() == 1 and 0 < apart.mean() < 0.5
    assert error(deciding, learned) < 0.5 * error(deciding, nearest)


def test_brecq_learns_steps_of_inputs_after_the_weights():
    problem = problem_of(LLAMA, Rule("", bits=8, activation_bits=4))
    begun, learned = (
        solved(problem, methods.build(f"brecq:iterations=0,texts=8,input_iterations={n},input_rate=0.01"))
        for n in (0, 60)
    )
    assert set(learned.steps) == set(problem.schemes[0]) and all(step > 0 for step in learned.steps.values())
    jax.tree.map(np.testing.assert_array_equal, begun.weights, learned.weights)
    problem = dataclasses.replace(problem, rough=problem.exact)
    assert error(problem, learned) < 0.95 * error(problem, begun)
