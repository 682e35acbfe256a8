"""Language models of few bits in folders of AutoGPTQ's and AutoAWQ's form, in and out.

    model, variables, config = load("/models/Llama-2-7B-GPTQ")
    logits, _ = jax.jit(rules.apply(model))(variables, tokens)            # research.quantize.rules
    save("out", model, variables, layout="autogptq")

A folder is one of Hugging Face's (`research.language.checkpoint`) in which dense layers have the arrays of
`research.quantize.layouts` in the place of `weight`, such as `model.layers.0.self_attn.q_proj.qweight`. How they lie
is the `quantization_config` of `config.json`, or a file `quantize_config.json` (AutoGPTQ) or `quant_config.json` (early
AutoAWQ). Which layers have few bits is read from the names.
"""

import json
import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from research import language
from research.core import storage
from research.language import checkpoint
from research.language.checkpoint import Pretrained
from research.port import names, tensors
from research.quantize.layouts import LAYOUTS
from research.quantize.quantized import Packed, Quantized, pack, unpack
from research.quantize.rules import is_few

SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
# (quant_method, checkpoint_format or version) -> layout
FORMATS = {("gptq", "gptq"): "autogptq", ("gptq", "gptq_v2"): "autogptq_v2", ("awq", "gemm"): "autoawq"}
_pack, _unpack = jax.jit(pack), jax.jit(unpack)


class Settings(NamedTuple):
    """How the arrays of a folder lie.

    Fields:
      layout: of `research.quantize.layouts`; bits: of a code; group: inputs to a scale, None for all of them.
      files: names the weights may have beside those of Hugging Face.
    """

    layout: str
    bits: int
    group: int | None
    files: tuple[str, ...]


def load(folder: str | os.PathLike, *, param_dtype=jnp.float32, **overrides) -> Pretrained:
    """The language model in `folder`, its few-bit kernels as `Packed`, all arrays NumPy's.

    Args:
      param_dtype: of the parameters, scales and zero points among them; None keeps the file's, float16 as a rule.
      **overrides: of the model's fields, such as `dtype=jnp.bfloat16`.
    Raises:
      FileNotFoundError: no such folder, config or weights.
      ValueError: a model type or form of quantisation that is not known, weights that do not fit the config.
    """
    root = storage.folder(folder)
    config = checkpoint.read_json(root / "config.json")
    settings = settings_of(root, config)
    if config.get("model_type") not in checkpoint.MODEL_TYPES:
        known = ", ".join(checkpoint.MODEL_TYPES)
        raise ValueError(f"{root / 'config.json'}: model_type {config.get('model_type')!r} is none of {known}")
    try:
        model = checkpoint.MODEL_TYPES[config["model_type"]].from_config(config, **overrides)
        variables = from_state(model, _read(root, settings.files), settings, param_dtype)
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from None
    return Pretrained(model, variables, config)


def settings_of(root: storage.Path, config: Mapping) -> Settings:
    """What a folder says of its few bits, in `config` (of `config.json`) or a file beside it.

    Raises:
      ValueError: nothing, or a form that is not known.
    """
    where, stated = root / "config.json", config.get("quantization_config")
    for name in SETTINGS_FILES:
        if not stated and (root / name).is_file():
            where, stated = root / name, checkpoint.read_json(root / name)
    if not stated:
        raise ValueError(
            f"{root}: config.json has no quantization_config, and there is no {' nor '.join(SETTINGS_FILES)}; weights "
            "in real numbers are read by research.language.checkpoint"
        )
    value = lambda *keys: next((stated[key] for key in keys if stated.get(key) is not None), None)
    method = value("quant_method") or ("awq" if value("version", "w_bit") else "gptq")
    form = (value("checkpoint_format") or "gptq") if method == "gptq" else (value("version") or "gemm")
    form = "marlin" if stated.get("is_marlin_format") else "llm-awq" if value("backend") == "llm-awq" else form
    bits, group = value("bits", "w_bit"), value("group_size", "q_group_size")
    layout = FORMATS.get((method, form.lower()))
    if layout is None:
        known = ", ".join(f"{m} {f}" for m, f in FORMATS)
        raise ValueError(f"{where}: arrays in the form {method} {form} are not read here, but {known}")
    if bits not in LAYOUTS[layout].bits:
        raise ValueError(f"{where}: bits {bits} is none of {', '.join(map(str, LAYOUTS[layout].bits))} of {layout}")
    if not isinstance(group, int) or group == 0 or group < -1:
        raise ValueError(f"{where}: group_size {group} is no number of inputs to a scale, nor -1 for all of them")
    files = [value("model_file_base_name"), f"gptq_model-{bits}bit-{group}g"] if method == "gptq" else []
    return Settings(layout, bits, None if group == -1 else group, tuple(filter(None, files)))


def from_state(model: nn.Module, state: Mapping[str, np.ndarray], settings: Settings, param_dtype=None) -> dict:
    """Variables of `model` from an official state dict whose dense layers have few bits.

    Raises:
      ValueError: no layer has, or names are missing, left over or of another shape.
    """
    layers, rest = _split(state, (*LAYOUTS[settings.layout].parts, "g_idx"))
    shapes = language.shapes(model)
    paths, flat, few = names.table(shapes, checkpoint.rules_of(model)), traverse_util.flatten_dict(shapes), {}
    for layer, arrays in layers.items():
        path = paths.get(f"{layer}.weight")
        if path is None:
            raise ValueError(f"{layer} has few bits, but the model has no such layer")
        if f"{layer}.bias" not in paths and not np.any(rest.get(f"{layer}.bias", 0)):
            rest.pop(f"{layer}.bias", None)  # early AutoGPTQ gave each layer one, of zeros
        q, dtype = _layer(layer, arrays, settings, flat[path].shape), param_dtype or arrays["scales"].dtype
        few[path] = jax.device_get(_pack(q.replace(scales=q.scales.astype(dtype), zeros=q.zeros.astype(dtype))))
        # Stands for the weight where names and shapes are checked, and takes no memory.
        rest[f"{layer}.weight"] = np.broadcast_to(np.float16(0), q.shape[::-1])
    flat = traverse_util.flatten_dict(checkpoint.from_state(model, rest))
    flat = {path: few[path] if path in few else np.asarray(x, param_dtype or x.dtype) for path, x in flat.items()}
    return traverse_util.unflatten_dict(flat)


def save(
    folder: str | os.PathLike, model: nn.Module, variables, config: Mapping | None = None, *, layout: str = "autogptq"
) -> None:
    """Writes `model` with the few-bit kernels among its `variables` as AutoGPTQ or AutoAWQ does, in one file.

    Kernels are `Quantized` or `Packed`, scales become float16. Other parameters keep their dtype.

    Args:
      config: what else to state in `config.json`, such as special tokens.
      layout: "autogptq", "autogptq_v2" or "autoawq".
    Raises:
      ValueError: another layout, no kernel of few bits, kernels of different forms or of one the layout cannot hold,
        options a Hugging Face config cannot state.
    """
    root, family = storage.folder(folder), language.family_of(model)
    if layout not in FORMATS.values():
        raise ValueError(f"layout: {layout!r} is none of {', '.join(FORMATS.values())}")
    stated = {**(config or {}), **family.to_config(model)}
    if family.from_config(stated, dtype=model.dtype) != model:
        raise ValueError(f"no config.json of Hugging Face can state this model: {model}")
    flat = traverse_util.flatten_dict(variables)
    layer_of = lambda path: names.official(path, checkpoint.rules_of(model))[0].removesuffix(".weight")
    few = {layer_of(path): _unpack(x) if isinstance(x, Packed) else x for path, x in flat.items() if is_few(x)}
    real = {path: x for path, x in flat.items() if not is_few(x)}
    bits, group = _form(few)
    state = names.to_official(traverse_util.unflatten_dict(real), checkpoint.rules_of(model))
    for layer, q in few.items():
        try:
            state |= {f"{layer}.{part}": array for part, array in LAYOUTS[layout].write(q).items()}
        except ValueError as error:
            raise ValueError(f"{layer}: {error}") from None
    kept = [layer_of(path) for path, x in real.items() if path[-1] == "kernel" and x.ndim == 2]
    settings = {"bits": bits, "group_size": group or -1, **_stated(layout, few, kept)}
    tensors.write(root / "model.safetensors", state, {"format": "pt"})
    if layout != "autoawq":
        storage.write(root / SETTINGS_FILES[0], json.dumps(settings, indent=2))
    storage.write(root / "config.json", json.dumps({**stated, "quantization_config": settings}, indent=2))


def _layer(layer: str, arrays: Mapping[str, np.ndarray], settings: Settings, shape: tuple[int, int]) -> Quantized:
    """The kernel of one layer, of a model's `shape` (K, N)."""
    layout, (k, n) = LAYOUTS[settings.layout], shape
    if missing := [part for part in layout.parts if part not in arrays]:
        raise ValueError(f"{layer} has a qweight but no {', '.join(missing)}")
    group = min(settings.group or k, k)
    if arrays["scales"].shape != (-(-k // group), n):
        raise ValueError(
            f"{layer}.scales has shape {arrays['scales'].shape}, where {n} outputs and groups of {group} of the {k} "
            f"inputs have {(-(-k // group), n)}: compare group_size and the model's config"
        )
    try:
        q = layout.read(arrays, settings.bits, settings.group)
    except ValueError as error:
        raise ValueError(f"{layer}: {error}") from None
    if q.group != group:
        raise ValueError(f"{layer}.g_idx makes groups of {q.group} inputs, where the settings say {group}")
    return q


def _form(few: Mapping[str, Quantized]) -> tuple[int, int | None]:
    """The bits and the group that all layers share; a layer with fewer inputs than a group has one group."""
    if not few:
        raise ValueError("no kernel has few bits: real numbers are written by research.language.checkpoint")
    bits = next(iter(few.values())).bits
    group = min((q.group for q in few.values() if q.group < q.length), default=None)
    for layer, q in few.items():
        if q.bits != bits or q.group != min(group or q.length, q.length):
            raise ValueError(
                f"{layer} has {q.bits} bits and groups of {q.group} of its {q.length} inputs, where others have {bits} "
                f"bits and groups of {group or 'all inputs'}: a folder states one form of all"
            )
    return bits, group


def _stated(layout: str, few: Mapping[str, Quantized], kept: list[str]) -> dict:
    method, form = next(key for key, value in FORMATS.items() if value == layout)
    if method == "awq":
        return {"quant_method": method, "version": form, "zero_point": True, "modules_to_not_convert": kept or None}
    middle = lambda q: q.zeros is None or bool((q.zeros == 2 ** (q.bits - 1)).all())
    return {
        "quant_method": method,
        "checkpoint_format": form,
        "desc_act": any(q.order is not None for q in few.values()),
        "sym": all(map(middle, few.values())),
        "lm_head": "lm_head" in few,
    }


def _split(state: Mapping[str, np.ndarray], parts: tuple[str, ...]) -> tuple[dict[str, dict], dict]:
    """({layer: {part: array}} of the layers of few bits, the other arrays)."""
    layers, rest = {name.removesuffix(".qweight"): {} for name in state if name.endswith(".qweight")}, {}
    if not layers:
        raise ValueError("no layer has few bits: no name ends in .qweight")
    for name, array in state.items():
        layer, _, part = name.rpartition(".")
        if layer in layers and part in parts:
            layers[layer][part] = array
        else:
            rest[name] = array
    return layers, rest


def _read(root: storage.Path, files: tuple[str, ...]) -> dict[str, np.ndarray]:
    found = next((root / f"{name}.safetensors" for name in files if (root / f"{name}.safetensors").is_file()), None)
    return checkpoint.read(root) if found is None else tensors.read(found)
