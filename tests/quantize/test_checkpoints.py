"""Folders of AutoGPTQ and AutoAWQ, written here by the documented layouts, value by value."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from research.language import checkpoint, llama
from research.port import tensors
from research.quantize import checkpoints, rules
from research.quantize.quantized import Packed, unpack
from research.quantize.rules import Rule

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
SHAPES = {  # (inputs, outputs)
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 96),
    "mlp.up_proj": (64, 96),
    "mlp.down_proj": (96, 64),
}
LAYERS = {f"model.layers.0.{name}": shape for name, shape in SHAPES.items()}
TOKENS = np.random.default_rng(0).integers(0, 48, (2, 7)).astype(np.int32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def as_words(numbers):
    """Python integers of 32 bits -> int32."""
    return np.array(numbers, np.uint32).view(np.int32)


def stream(values, bits):
    """Values one after the other from the lowest bit of the first word on; they may straddle words."""
    number = sum(int(value) << (bits * i) for i, value in enumerate(values))
    return as_words([(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(values) * bits // 32)])


def nibbles(values):
    """AutoAWQ: nibble i of a word is column AWQ_ORDER[i] of its eight."""
    eights = [values[i : i + 8] for i in range(0, len(values), 8)]
    return as_words([sum(int(eight[AWQ_ORDER[i]]) << (4 * i) for i in range(8)) for eight in eights])


def gptq_layer(codes, zeros, scales, g_idx, bits, less):
    qweight = np.stack([stream(column, bits) for column in codes.T], axis=1)
    qzeros = np.stack([stream((row - less) % 2**bits, bits) for row in zeros])
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx.astype(np.int32)}


def awq_layer(codes, zeros, scales):
    return {"qweight": np.stack([*map(nibbles, codes)]), "qzeros": np.stack([*map(nibbles, zeros)]), "scales": scales}


def make(root, kind, bits=4, group=32, order=False, symmetric=False, less=1, config=None):
    """Writes a folder with random codes; returns the state dict of what they stand for."""
    rng = np.random.default_rng(bits)
    state = {
        "model.embed_tokens.weight": rng.normal(size=(48, 64)),
        "lm_head.weight": rng.normal(size=(48, 64)) / 8,
        "model.norm.weight": rng.uniform(0.5, 1.5, 64),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        state[f"model.layers.0.{norm}.weight"] = rng.uniform(0.5, 1.5, 64)
    real, few = {name: array.astype(np.float16) for name, array in state.items()}, {}
    for layer, (k, n) in LAYERS.items():
        size = k if group == -1 else group
        g_idx = np.arange(k) // size
        g_idx = rng.permutation(g_idx) if order else g_idx
        codes = rng.integers(0, 2**bits, (k, n))
        zeros = np.full((k // size, n), 2 ** (bits - 1)) if symmetric else rng.integers(0, 2**bits, (k // size, n))
        scales = (rng.uniform(0.5, 1, (k // size, n)) / 2**bits / k**0.5).astype(np.float16)
        real[f"{layer}.weight"] = (scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx])).T.astype(np.float32)
        parts = (
            awq_layer(codes, zeros, scales) if kind == "awq" else gptq_layer(codes, zeros, scales, g_idx, bits, less)
        )
        few |= {f"{layer}.{part}": array for part, array in parts.items()}
    few |= {name: array for name, array in real.items() if name.rpartition(".")[0] not in LAYERS}
    stated = {"quant_method": kind, "bits": bits, "group_size": group}
    write(root, few, {**CONFIG, "quantization_config": {**stated, **(config or {})}})
    return real


def write(root, state, config, name="model"):
    tensors.write(root / f"{name}.safetensors", state, {"format": "pt"})
    (root / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def reference():
    """A function of a state dict in real numbers: logits."""
    model = llama.from_config(CONFIG)
    run = jax.jit(lambda variables: model.apply(variables, TOKENS)[0])
    cast = lambda variables: jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
    return lambda state: np.asarray(run(cast(checkpoint.from_state(model, state))))


CASES = {
    "gptq": {"kind": "gptq"},
    "gptq_act_order": {"kind": "gptq", "bits": 3, "order": True, "config": {"desc_act": True}},
    "gptq_v2": {"kind": "gptq", "bits": 2, "less": 0, "config": {"checkpoint_format": "gptq_v2"}},
    "gptq_8": {"kind": "gptq", "bits": 8, "group": -1, "symmetric": True, "config": {"sym": True}},
    "awq": {"kind": "awq", "config": {"version": "gemm", "zero_point": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_computes_what_its_codes_stand_for(case, tmp_path, reference):
    expected = reference(make(tmp_path, **CASES[case]))
    model, variables, config = checkpoints.load(tmp_path)
    few = {path: x for path, x in traverse_util.flatten_dict(variables).items() if isinstance(x, Packed)}
    assert len(few) == len(LAYERS) and config["vocab_size"] == 48
    bits, group = CASES[case].get("bits", 4), CASES[case].get("group", 32)
    for x in few.values():
        k, n = x.shape
        groups = 1 if group == -1 else k // group
        assert sum(plane.nbytes for plane in x.planes) == k * n * bits // 8
        assert x.scales.shape == x.zeros.shape == (groups, n)
    logits, _ = jax.jit(rules.apply(model))(variables, TOKENS)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_was_read(case, tmp_path):
    make(tmp_path / "one", **CASES[case])
    layout = {"gptq_v2": "autogptq_v2", "awq": "autoawq"}.get(case, "autogptq")
    loaded = checkpoints.load(tmp_path / "one", param_dtype=None)
    checkpoints.save(tmp_path / "two", *loaded, layout=layout)
    one, two = (tensors.read(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    for name in one:
        assert one[name].dtype == two[name].dtype
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    stated = json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    expected = {"bits": 4, "group_size": 32, **{k: v for k, v in CASES[case].items() if k == "bits"}}
    expected |= {"group_size": CASES[case].get("group", 32), **CASES[case].get("config", {})}
    assert expected.items() <= stated.items()
    if layout != "autoawq":
        assert json.loads((tmp_path / "two" / "quantize_config.json").read_text()) == stated


def test_a_model_quantised_here_is_written(tmp_path):
    """Symmetric codes by `rules`, whose scales float16 can hold, come back as they were."""
    model = llama.from_config(CONFIG)
    state = make(tmp_path, "gptq")
    params = checkpoint.from_state(model, state)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    settings = (Rule("layers_", bits=4, group=16, rule="gptq_symmetric"),)
    few = jax.jit(lambda p: rules.quantize_params(p, settings))(params)
    halves = lambda q: dataclasses.replace(q, scales=q.scales.astype(jnp.float16).astype(jnp.float32))
    few = jax.tree.map(lambda x: halves(x) if rules.is_few(x) else x, few, is_leaf=rules.is_few)
    checkpoints.save(tmp_path / "out", model, {"params": few}, {"bos_token_id": 1})
    again = checkpoints.load(tmp_path / "out")
    assert again.config["bos_token_id"] == 1 and again.config["quantization_config"]["sym"]
    real = jax.jit(rules.dequantize_params)
    jax.tree.map(np.testing.assert_array_equal, real(again.variables)["params"], real(few))


def test_older_files_are_understood(tmp_path):
    """Settings beside config.json, AutoGPTQ's own name of the weights, a bias of zeros for each layer."""
    make(tmp_path, "gptq")
    plain, state = checkpoints.load(tmp_path), tensors.read(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    biases = {f"{layer}.bias": np.zeros(n, np.float16) for layer, (_, n) in LAYERS.items()}
    write(tmp_path, state | biases, CONFIG, "gptq_model-4bit-32g")
    settings = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(settings))
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load(tmp_path).variables, plain.variables)
    root = tmp_path / "awq"
    make(root, "awq")
    plain = checkpoints.load(root)
    (root / "config.json").write_text(json.dumps(CONFIG))
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (root / "quant_config.json").write_text(json.dumps(settings))
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load(root).variables, plain.variables)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "config.json has no quantization_config, and there is no quantize_config.json nor quant_config.json"),
        ({"quant_method": "bitsandbytes"}, "arrays in the form bitsandbytes gemm are not read here, but gptq gptq"),
        ({"quant_method": "awq", "version": "gemv"}, "arrays in the form awq gemv are not read here"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "arrays in the form gptq marlin are not read here"),
        ({"quant_method": "awq", "bits": 3}, "config.json: bits 3 is none of 4 of autoawq"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0 is no number of inputs to a scale"),
    ],
)
def test_settings_that_are_not_known_are_named(settings, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": settings}))
    with pytest.raises(ValueError, match=message):
        checkpoints.load(tmp_path)


def test_arrays_that_do_not_fit_are_named(tmp_path):
    make(tmp_path, "gptq")
    state, layer = tensors.read(tmp_path / "model.safetensors"), "model.layers.0.mlp.up_proj"
    config = json.loads((tmp_path / "config.json").read_text())
    real = {name: array for name, array in state.items() if not name.startswith("model.layers")}
    wrong = {
        f"{layer} has a qweight but no scales": {k: v for k, v in state.items() if k != f"{layer}.scales"},
        "proj.bias": state | {f"{layer}.bias": np.ones(96, np.float16)},
        "model.other has few bits, but the model has no such layer": state
        | {"model.other.qweight": state[f"{layer}.qweight"]}
        | {f"model.other.{part}": state[f"{layer}.{part}"] for part in ("qzeros", "scales")},
        f"{layer}.scales has shape": state | {f"{layer}.scales": state[f"{layer}.scales"][:1]},
        f"{layer}.g_idx makes groups of 40 inputs, where the settings say 32": state
        | {f"{layer}.g_idx": np.repeat(np.int32([0, 1]), [40, 24])},
        "no name ends in .qweight": real,
    }
    for message, arrays in wrong.items():
        write(tmp_path, arrays, config)
        with pytest.raises(ValueError, match=message):
            checkpoints.load(tmp_path)


def test_kernels_that_one_form_cannot_state_are_refused(tmp_path):
    make(tmp_path, "gptq")
    model, variables, _ = checkpoints.load(tmp_path)
    flat = traverse_util.flatten_dict(variables)
    path = next(path for path, x in flat.items() if rules.is_few(x) and path[-2] == "up_proj")
    flat[path] = jax.jit(unpack)(flat[path]).replace(bits=8)
    few = traverse_util.unflatten_dict(flat)
    with pytest.raises(ValueError, match="layout: 'tinychat' is none of autogptq, autogptq_v2, autoawq"):
        checkpoints.save(tmp_path, model, variables, layout="tinychat")
    with pytest.raises(ValueError, match="up_proj has 8 bits and groups of 32 of its 64 inputs, where others have 4"):
        checkpoints.save(tmp_path, model, few)
    with pytest.raises(ValueError, match="no kernel has few bits"):
        checkpoints.save(tmp_path, model, jax.jit(rules.dequantize_params)(variables))
