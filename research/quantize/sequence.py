"""A causal language model as a sequence of blocks, which calibration walks through one after the other.

    blocks = Blocks(model)
    x, shared = blocks.start(variables, tokens)
    y = blocks.block(shared)(weights, x, enter)          # one block; weights of `own(params, index)`

`weights` are a flat dict of one block's arrays by slash path (`self_attn/q_proj/kernel`). What is multiplied by a
kernel passes through `enter(path, x)` first, so that activations can be looked at and rounded from outside.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax import linen as nn
from flax import traverse_util
from flax.core import FrozenDict, freeze

from research import language
from research.language.causal import CausalModel, Shared
from research.quantize import rules, smoothquant
from research.quantize.quantized import Quantized, dequantize
from research.quantize.rules import Rule
from research.quantize.window import Block, Enter, Scheme, Weights

Schemes = FrozenDict  # path of a kernel -> Scheme; hashable, so that compiled functions can be told apart by it


class Fold(NamedTuple):
    """Channels that may be scaled: by `maker`, a norm or a layer whose outputs they are, read by `readers` alone."""

    maker: str
    readers: tuple[str, ...]


class Plan(NamedTuple):
    """What is known of a family's block.

    Fields:
      stages: dense layers in the order in which they are computed, those with one input together.
      folds: see `Fold`; norms first.
    """

    stages: tuple[tuple[str, ...], ...]
    folds: tuple[Fold, ...]


_QKV = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")
_OUT = ("self_attn/o_proj",)
PLANS = {
    "llama": Plan(
        (_QKV, _OUT, ("mlp/gate_proj", "mlp/up_proj"), ("mlp/down_proj",)),
        (
            Fold("input_layernorm", _QKV),
            Fold("post_attention_layernorm", ("mlp/gate_proj", "mlp/up_proj")),
            Fold("self_attn/v_proj", _OUT),
            Fold("mlp/up_proj", ("mlp/down_proj",)),
        ),
    ),
    "opt": Plan(
        (_QKV, _OUT, ("fc1",), ("fc2",)),
        (
            Fold("self_attn_layer_norm", _QKV),
            Fold("final_layer_norm", ("fc1",)),
            Fold("self_attn/v_proj", _OUT),
            Fold("fc1", ("fc2",)),  # through a ReLU, which keeps positive scales
        ),
    ),
}


def kernel(layer: str) -> str:
    """The path of a dense layer's kernel."""
    return f"{layer}/kernel"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a model; hashable, a static argument of compiled functions.

    Raises:
      ValueError: a family whose blocks are not known, or blocks that are not dense layers alone.
    """

    model: CausalModel

    def __post_init__(self):
        family = language.family_of(self.model).__name__.rpartition(".")[2]
        if family not in PLANS:
            raise ValueError(f"calibration knows the blocks of {', '.join(PLANS)}, not those of {family}")
        if getattr(self.model, "num_experts", 0):
            raise ValueError("calibration takes models without experts: num_experts must be 0")

    @property
    def plan(self) -> Plan:
        return PLANS[language.family_of(self.model).__name__.rpartition(".")[2]]

    @property
    def count(self) -> int:
        return self.model.num_hidden_layers

    def folds(self, weights: Mapping) -> tuple[Fold, ...]:
        """The plan's folds that leave what this model computes as it is; `weights` are of one block.

        A norm must have a scale and stand before what is added, which in `opt_350m` it does not; a layer must have an
        output for each input of its reader, which values shared by heads lack; and between OPT's layers only a ReLU
        keeps scales.
        """

        def keeps(fold: Fold) -> bool:
            if kernel(fold.maker) not in weights:
                return f"{fold.maker}/scale" in weights and getattr(self.model, "do_layer_norm_before", True)
            fits = weights[kernel(fold.maker)].shape[1] == len(weights[kernel(fold.readers[0])])
            return fits and (fold.maker != "fc1" or self.model.activation_function == "relu")

        return tuple(fold for fold in self.plan.folds if keeps(fold))

    def start(self, params: Mapping, tokens: jax.Array) -> tuple[jax.Array, Shared]:
        """Tokens (B, N) -> what enters the first block (B, N, C), and what all blocks are given beside it."""
        return self.model.apply({"params": params}, tokens, method="embed")[:2]

    def block(self, shared: Shared) -> Block:
        """Any block, as a function of its weights, its input and `enter`."""
        layer = language.family_of(self.model).block(self.model)

        def run(weights: Weights, x: jax.Array, enter: Enter) -> jax.Array:
            def call(method, args, kwargs, context):
                if context.method_name == "__call__" and isinstance(context.module, nn.Dense):
                    return method(enter(kernel("/".join(context.module.path)), args[0]), *args[1:], **kwargs)
                return method(*args, **kwargs)

            with nn.intercept_methods(call):
                return layer.apply({"params": traverse_util.unflatten_dict(dict(weights), sep="/")}, x, shared)[0]

        return run

    def own(self, params: Mapping, index: int) -> dict:
        """The arrays of one block by slash path."""
        return traverse_util.flatten_dict(params[f"layers_{index}"], sep="/")

    def schemes(self, settings: tuple[Rule, ...], index: int) -> Schemes:
        """What the rules say of one block's kernels; they see paths of the whole model, `layers_3/mlp/up_proj`."""
        found = {}
        for layer in (layer for stage in self.plan.stages for layer in stage):
            rule = rules.first(settings, f"layers_{index}/{layer}")
            if rule is not None and rule.form is not None:
                found[kernel(layer)] = Scheme(rule.form, rule.activation_bits)
        return freeze(found)


def real(weights: Mapping) -> dict:
    """The weights of a block with kernels of few bits read back."""
    return {path: dequantize(w) if isinstance(w, Quantized) else w for path, w in weights.items()}


def tapped(enter: Enter, seen: dict) -> Enter:
    """`enter` that notes in `seen`, by path, what leaves it: what each kernel is multiplied with."""

    def noting(path: str, x: jax.Array) -> jax.Array:
        seen[path] = enter(path, x)
        return seen[path]

    return noting


def folded(weights: Weights, fold: Fold, factors: jax.Array) -> dict:
    """The arrays of a block whose channels between `fold.maker` and its readers are divided by `factors` (K,)."""
    made = {path: w for path, w in weights.items() if path.startswith(f"{fold.maker}/")}
    read = [kernel(layer) for layer in fold.readers]
    parameters, kernels = smoothquant.fold(list(made.values()), [weights[path] for path in read], factors)
    return {**weights, **dict(zip(made, parameters, strict=True)), **dict(zip(read, kernels, strict=True))}
