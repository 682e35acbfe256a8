"""Calibration of whole models: against rounding by hand, block after block, and against the model itself."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from research import language
from research.core.errors import UserError
from research.language import bert, llama, opt
from research.quantize import gptq, rules
from research.quantize.calibration import Outcome, calibrate
from research.quantize.methods import METHODS, Cbq, Gptq, Nearest
from research.quantize.quantized import Quantized, dequantize
from research.quantize.rules import Rule

LLAMA = llama.build(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
)
OPT = opt.build(
    vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12
)
STAGES = {  # by hand, in the order of `--true-sequential`
    LLAMA: ("self_attn/[qkv]_proj", "self_attn/o_proj", "mlp/(gate|up)_proj", "mlp/down_proj"),
    OPT: ("self_attn/[qkv]_proj", "self_attn/o_proj", "fc1", "fc2"),
}
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 12)).astype(np.int32)
FOUR = (Rule("^layers_", bits=4, group=8),)
silent = functools.partial(calibrate, progress=lambda line: None)


@functools.cache
def params_of(model) -> dict:
    """On the host, large enough that a block changes what passes through it."""
    drawn = jax.jit(lambda: language.init(model, jax.random.key(0))["params"])()
    return jax.tree.map(lambda x: np.asarray(x) * (8 if x.ndim == 2 else 1), drawn)


@functools.cache
def looking(model):
    """A function of parameters: logits, states and all that is multiplied by a kernel of (K, N), by layer."""

    @jax.jit
    def run(params):
        seen = {}

        def call(method, args, kwargs, context):
            if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
                seen["/".join(context.module.path)] = args[0]
            return method(*args, **kwargs)

        with nn.intercept_methods(call):
            logits, states = model.apply({"params": params}, TOKENS)
        return logits, states, seen

    return run


def kernels(params) -> dict:
    """{layer: kernel} of the blocks."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {k.removesuffix("/kernel"): w for k, w in flat.items() if k.endswith("/kernel") and k.startswith("layers_")}


def real(params) -> dict:
    return jax.jit(rules.dequantize_params)(params)


def nested(flat) -> dict:
    return traverse_util.unflatten_dict(flat, sep="/")


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)


def one_kernel(w, x) -> Quantized:
    """A kernel by GPTQ, from what it is multiplied with."""
    moment = gptq.add(gptq.second_moment(len(w)), x)
    return gptq.gptq(jnp.asarray(w), moment, FOUR[0].form)[0]


@pytest.mark.parametrize("model", STAGES, ids=["llama", "opt"])
def test_gptq_is_that_of_each_stage_by_hand(model):
    found = silent(model, params_of(model), TOKENS, FOUR, Gptq()).params
    codes = {layer: np.asarray(q.codes) for layer, q in kernels(found).items()}
    flat = traverse_util.flatten_dict(params_of(model), sep="/")
    before, moved = looking(model)(params_of(model))[2], []
    for index in range(model.num_hidden_layers):
        for stage in STAGES[model]:
            seen = looking(model)(nested(flat))[2]
            for layer in [layer for layer in codes if re.fullmatch(f"layers_{index}/{stage}", layer)]:
                by_hand = functools.partial(one_kernel, flat[f"{layer}/kernel"])
                assert np.mean(codes[layer] != by_hand(seen[layer]).codes) < 0.01, layer  # sums round otherwise
                moved.append(np.mean(codes[layer] != by_hand(before[layer]).codes))
                flat[f"{layer}/kernel"] = np.asarray(dequantize(kernels(found)[layer]))
    assert np.mean(moved) > 0.02  # what errors came before a layer decides
    outside = lambda params: {k: v for k, v in params.items() if not k.startswith("layers_")}
    assert_same(outside(found), outside(params_of(model)))


def test_nearest_is_that_of_the_rules_and_runs_packed():
    found = silent(OPT, params_of(OPT), TOKENS, FOUR, Nearest(), batch=3)
    expected = jax.jit(lambda tree: rules.quantize_params(tree, FOUR))(params_of(OPT))
    assert_same(found.params, expected)
    wanted, states, _ = looking(OPT)(real(found.params))
    logits, _ = jax.jit(rules.apply(OPT))({"params": jax.jit(rules.pack_params)(found.params)}, TOKENS)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    exact = looking(OPT)(params_of(OPT))[1]
    for index, error in enumerate(found.errors):
        rough, right = (np.asarray(s[f"hidden_{index + 1}"], np.float64) for s in (states, exact))
        np.testing.assert_allclose(error, np.sum((rough - right) ** 2) / np.sum(right**2), rtol=1e-3)
        assert 1e-4 < error < 1


@dataclasses.dataclass(frozen=True)
class Recording:
    """Rounds nothing and keeps what it was asked."""

    window: int
    overlap: int
    asked: list = dataclasses.field(default_factory=list, repr=False, compare=False)

    def __call__(self, problem):
        inside = list(range(problem.first, problem.first + len(problem.weights)))
        self.asked.append((inside, list(problem.carried), np.array(problem.exact), np.array(problem.rough)))
        self.asked[-1] += (isinstance(problem.exact, np.memmap), jax.random.key_data(problem.key).tolist())
        return [Outcome(own, {}, {"of": np.int32(i)}) for i, own in zip(inside, problem.weights, strict=True)]


@pytest.mark.parametrize(
    "window, overlap, expected",
    [
        (1, 0, [[0], [1], [2], [3]]),
        (2, 1, [[0, 1], [1, 2], [2, 3]]),
        (3, 2, [[0, 1, 2], [1, 2, 3]]),
        (3, 1, [[0, 1, 2], [2, 3]]),
        (2, 0, [[0, 1], [2, 3]]),
        (9, 4, [[0, 1, 2, 3]]),
    ],
)
def test_windows_move_on_by_what_is_final(window, overlap, expected, tmp_path):
    method, lines = Recording(window, overlap), []
    found = calibrate(LLAMA, params_of(LLAMA), TOKENS, FOUR, method, folder=tmp_path, progress=lines.append)
    assert [asked[0] for asked in method.asked] == expected
    assert_same(found.params, params_of(LLAMA))
    assert found.errors == [0] * 4
    states, last = looking(LLAMA)(params_of(LLAMA))[1], []
    for inside, carried, exact, rough, on_disk, _ in method.asked:
        assert [None if own is None else int(own["of"]) for own in carried] == [
            i if i in last else None for i in inside
        ]
        np.testing.assert_allclose(exact, states[f"hidden_{inside[0]}"], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(exact, rough)
        assert on_disk
        last = inside
    assert len({tuple(asked[-1]) for asked in method.asked}) == len(expected)  # no key twice
    for name in ("exact", "rough"):
        assert (tmp_path / f"{name}.activations").stat().st_size == 4 * TOKENS.size * LLAMA.hidden_size
    said = "blocks {} to {} of 4: relative error 0.00e+00, "
    assert [line.startswith(said.format(i[0], i[-1])) for line, i in zip(lines, expected, strict=True)]
    assert all(re.search(r", \d+ s left$", line) for line in lines) and lines[-1].endswith(" 0 s left")


class Stopped(Exception):
    pass


def stop_after(windows):
    """A `progress` that ends the calibration after so many windows."""
    left = [windows]

    def progress(line):
        left[0] -= 1
        if not left[0]:
            raise Stopped

    return progress


CASES = {
    "gptq": (FOUR, Gptq(), 4),
    "cbq": (
        (Rule("^layers_", bits=4, group=8, activation_bits=4),),
        Cbq(epochs=2, texts=2, start="nearest", learn_inputs=True),
        3,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_calibration_goes_on_after_every_window(case, tmp_path, monkeypatch):
    settings, method, windows = CASES[case]
    run = functools.partial(silent, LLAMA, params_of(LLAMA), TOKENS, settings, method, seed=3)
    whole, calls, call = run(), [], type(method).__call__
    monkeypatch.setattr(
        type(method), "__call__", lambda self, problem: calls.append(problem.first) or call(self, problem)
    )
    for stop in range(1, windows):
        folder = tmp_path / str(stop)
        with pytest.raises(Stopped):
            run(folder=folder, progress=stop_after(stop))
        assert calls == list(range(stop))
        found = run(folder=folder)
        assert calls == list(range(windows))
        calls.clear()
        assert_same((found.params, found.steps, found.errors), (whole.params, whole.steps, whole.errors))
    assert_same(run(folder=folder).params, whole.params)
    assert not calls  # it was done
    layers = kernels(whole.params)
    assert all(isinstance(q, Quantized) and q.bits == 4 and q.group == 8 for q in layers.values())
    assert set(whole.steps) == (set(layers) if settings[0].activation_bits else set())


def broken(model, path):
    flat = traverse_util.flatten_dict(params_of(model), sep="/")
    flat[path] = np.where(np.arange(flat[path].size).reshape(flat[path].shape) == 5, np.nan, flat[path])
    return nested(flat)


@pytest.mark.parametrize("name", ["rtn", "gptq", "cbq"])
def test_a_layer_with_activations_that_are_not_finite_is_named(name):
    settings, method = CASES.get(name, (FOUR, METHODS[name]()))[:2]
    with pytest.raises(ValueError, match="layers_1/mlp/down_proj.*NaN or infinite"):
        silent(LLAMA, broken(LLAMA, "layers_1/mlp/gate_proj/kernel"), TOKENS, settings, method, seed=3)


def test_settings_of_another_calibration_are_named(tmp_path):
    asked = {"params": params_of(OPT), "tokens": TOKENS, "settings": FOUR, "method": Gptq(), "seed": 0}
    with pytest.raises(Stopped):
        calibrate(OPT, **asked, folder=tmp_path, progress=stop_after(1))
    other = {
        "settings": {"settings": (Rule("^layers_", bits=3, group=8),)},
        "method": {"method": Gptq(damping=0.02)},
        "seed": {"seed": 1},
        "weights": {"params": jax.tree.map(lambda x: x + np.float32(1), params_of(OPT))},
        "data": {"tokens": TOKENS[::-1]},
    }
    for key, changed in other.items():
        with pytest.raises(UserError, match=f"holds a calibration with {key} .*resume it with the same settings"):
            silent(OPT, **{**asked, **changed}, folder=tmp_path)
    with pytest.raises(UserError, match="holds a calibration with (model|method)"):
        silent(LLAMA, **{**asked, "params": params_of(LLAMA)}, folder=tmp_path)


WRONG = {
    r"calibration data of shape \(0, 12\): give texts": {"tokens": TOKENS[:0]},
    r"calibration data of shape \(4, 0\)": {"tokens": TOKENS[:, :0]},
    r"calibration data of shape \(12,\)": {"tokens": TOKENS[0]},
    "layers_0/.*: group: 7 does not divide the 24": {"settings": (Rule("^layers_", bits=4, group=7),)},
    "overlap: 2 blocks is not from 0 to below the window's 2": {"method": Cbq(overlap=2)},
    "overlap: -1": {"method": Cbq(overlap=-1)},
    "rule '' decides about lm_head, which calibration leaves as it is": {"settings": (Rule("", bits=4),)},
    "rule '\\^layer' decides about no layer": {"settings": (*FOUR, Rule("^layer", bits=3))},
    "has activation_bits but no bits": {"settings": (Rule("^layers_", activation_bits=8),)},
    "layers_0/.*: .*no zero points|needs zero points": {
        "settings": (Rule("^layers_", bits=4, rule="absmax"),),
        "method": Cbq(),
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_calibrated_is_refused(message):
    asked = {"tokens": TOKENS, "settings": FOUR, "method": Nearest()} | WRONG[message]
    with pytest.raises(ValueError, match=message):
        silent(LLAMA, params_of(LLAMA), **asked)


def test_models_and_bits_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="bits: 9"):
        Rule("^layers_", bits=9)
    with pytest.raises(ValueError, match="knows the blocks of llama, opt, not those of bert"):
        silent(bert.build(), {}, TOKENS, FOUR, Nearest())
    with pytest.raises(ValueError, match="models without experts"):
        silent(llama.build(num_experts=2), {}, TOKENS, FOUR, Nearest())
