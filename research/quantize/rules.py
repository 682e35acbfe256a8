"""Few bits for any Flax model by rules on the paths of its layers; the model itself stays as it is.

    rules = (
        Rule(r"lm_head"),                                         # stays as it is
        Rule(r"self_attn/", bits=4, group=128, activation_bits=8),
        Rule(r"", bits=2, group=64, rule="omniquant"),            # all other dense layers
    )
    logits = apply(model, rules)({"params": fake(params, rules)}, tokens)          # rounded, in real numbers
    packed = pack_params(quantize_params(params, rules))                           # few bits in memory
    logits = jax.jit(apply(model, rules))({"params": packed}, tokens)              # and so multiplied

Rules speak of kernels (K, N), those of dense layers; all other parameters keep their values. A rule is found with
`re.search` in the slash path of a layer (`layers_0/self_attn/q_proj`) and the first found decides. Layers that no rule
matches stay as they are; a rule that decides about no layer is an error.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from research.core import sharding
from research.kernels.lowbit_matmul import ACTIVATION_BITS, Packed, lowbit_matmul
from research.quantize.fake import fake_quantize, stepped
from research.quantize.grids import Form
from research.quantize.quantized import Quantized, dequantize, pack, quantize, unpack

FEW = (Quantized, Packed)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What dense layers of matching paths become.

    Fields:
      path: regular expression.
      bits: of the kernel, 1 to 8; None keeps it.
      group: inputs to a scale; None for a scale to each output.
      activation_bits: of the layer's inputs, 2 to 8, each token by its largest magnitude; None keeps them.
      rule: of the kernel's grid, see `research.quantize.grids`.
      pad: fills up the last group, where `group` does not divide the inputs.
    Raises:
      ValueError: no regular expression, bits out of range, a grid that is none, a group without bits.
    """

    path: str
    bits: int | None = None
    group: int | None = None
    activation_bits: int | None = None
    rule: str = "gptq"
    pad: bool = False

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f"rule {self.path!r} is no regular expression: {error}") from None
        if self.activation_bits not in (None, *ACTIVATION_BITS):
            raise ValueError(f"rule {self.path!r}: activation_bits {self.activation_bits} is not from 2 to 8, nor None")
        if self.bits is None and self.group is not None:
            raise ValueError(f"rule {self.path!r} has a group of {self.group} inputs but no bits: give it bits")
        try:
            self.form  # noqa: B018 checked where the rule is written, not where it is used
        except ValueError as error:
            raise ValueError(f"rule {self.path!r}: {error}") from None

    @property
    def form(self) -> Form | None:
        """Of the kernel (K, N), None where it stays."""
        return None if self.bits is None else Form(self.bits, group=self.group, rule=self.rule, pad=self.pad)


def first(rules: Sequence[Rule], path: str) -> Rule | None:
    """The first rule found in a layer's slash path, or None."""
    return next((rule for rule in rules if re.search(rule.path, path)), None)


def match(params: Mapping, rules: Sequence[Rule]) -> dict[str, Rule]:
    """Slash path -> rule, for all layers with a kernel (K, N) that a rule matches.

    Args:
      params: nested arrays or shapes; kernels may have few bits already.
    Raises:
      ValueError: a rule that decides about no layer.
    """
    layers = ["/".join(path[:-1]) for path, leaf in traverse_util.flatten_dict(params).items() if _dense(path, leaf)]
    found = {layer: rule for layer in layers if (rule := first(rules, layer)) is not None}
    for rule in rules:
        if any(rule is decided for decided in found.values()):
            continue
        matching = [layer for layer in layers if re.search(rule.path, layer)]
        if matching:
            why = f"earlier rules decide about all it matches ({_some(matching)}): move it up or leave it out"
        else:
            why = f"no layer with a kernel (K, N) matches it; there are {_some(layers)}"
        raise ValueError(f"rule {rule.path!r} decides about no layer: {why}")
    return found


def quantize_params(params: Mapping, rules: Sequence[Rule]) -> dict:
    """`params` with a `Quantized` in the place of each kernel that a rule gives bits, rounded to the nearest codes.

    Raises:
      ValueError: a rule that decides about no layer, a group that does not divide a kernel's inputs, a kernel that has
        few bits already.
    """
    return _changed(params, rules, quantize)


def fake(params: Mapping, rules: Sequence[Rule]) -> dict:
    """`params` with kernels rounded and read back, in their dtype: what `quantize_params` stands for.

    Differentiable, straight-through. Raises what `quantize_params` does.
    """
    return _changed(params, rules, fake_quantize)


def pack_params(params: Mapping) -> dict:
    """`params` with a `Packed` for every `Quantized`: bits in memory as many as the rules say."""
    return jax.tree.map(lambda x: pack(x) if isinstance(x, Quantized) else x, params, is_leaf=is_few)


def dequantize_params(params: Mapping, dtype=None) -> dict:
    """`params` in real numbers again, `Quantized` and `Packed` kernels cast to `dtype` or that of their scales."""

    def real(leaf):
        leaf = unpack(leaf) if isinstance(leaf, Packed) else leaf
        return dequantize(leaf, dtype or leaf.scales.dtype) if isinstance(leaf, Quantized) else leaf

    return jax.tree.map(real, params, is_leaf=is_few)


def is_few(leaf) -> bool:
    """Whether a leaf is a kernel of few bits; for `jax.tree.map`."""
    return isinstance(leaf, FEW)


def apply(model: nn.Module, rules: Sequence[Rule] = (), steps: Mapping[str, jax.Array] | None = None) -> Callable:
    """`model.apply` in few bits: a function of variables and the model's arguments, to jit like any other.

    Args:
      rules: of activations; kernels come as they are, real or of few bits. Without rules activations stay real.
      steps: of inputs by layer path, as `calibration.calibrate` learns them; others are rounded token by token.
    Returns:
      A function that raises ValueError for a rule that decides about no layer.
    """

    def run(variables, *args, **kwargs):
        match(variables.get("params", {}), rules)
        with few_bits(rules, steps):
            return model.apply(variables, *args, **kwargs)

    return run


def few_bits(
    rules: Sequence[Rule] = (), steps: Mapping[str, jax.Array] | None = None
) -> contextlib.AbstractContextManager:
    """A context in which dense layers take kernels of few bits, and inputs of as many bits as `rules` say.

    It acts while a function is traced: a function that was compiled outside of it stays as it is inside, and the other
    way round. `apply` makes a new function and is safe.
    """

    def call(method, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__" or layer.scope is None:
            return method(*args, **kwargs)
        kernel = layer.get_variable("params", "kernel")
        if not isinstance(layer, nn.Dense):
            if is_few(kernel):
                raise ValueError(
                    f"{'/'.join(layer.path)}: only an nn.Dense multiplies by a kernel of few bits, no "
                    f"{type(layer).__name__}: give it a rule without bits, or real numbers by `fake`"
                )
            return method(*args, **kwargs)
        path = "/".join(layer.path)
        rule = first(rules, path)
        x = args[0] if args else kwargs["inputs"]
        bits = rule.activation_bits if rule else getattr(layer, "activation_bits", None)  # a QuantDense has its own
        if bits is not None and path in (steps or {}):
            x, bits = stepped(x, jnp.asarray(steps[path]), bits), None
        if is_few(kernel):
            return product(layer, x, kernel, bits)
        if bits is None:
            return method(x)
        x = x if layer.dtype is None else x.astype(layer.dtype)
        return method(fake_quantize(x, Form(bits, axis=-1, rule="absmax")))

    return nn.intercept_methods(call)


def product(layer: nn.Dense, x: jax.Array, kernel: Quantized | Packed, bits: int | None) -> jax.Array:
    """What a dense layer computes by a kernel of few bits, with its dtypes and inputs of `bits` or real ones."""
    packed = pack(kernel) if isinstance(kernel, Quantized) else kernel
    bias = layer.get_variable("params", "bias") if layer.use_bias else None
    x, _, bias = layer.promote_dtype(x, packed.scales, bias, dtype=layer.dtype)
    mesh = sharding.around(x.shape[0] if x.ndim > 1 else 1)
    return lowbit_matmul(x, packed, bias, activation_bits=bits, mesh=mesh)


def _changed(params, rules, change: Callable) -> dict:
    found, flat = match(params, rules), traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        layer = "/".join(path[:-1])
        if layer not in found or not _dense(path, leaf) or (form := found[layer].form) is None:
            continue
        if is_few(leaf):
            raise ValueError(f"{layer}: the kernel has {leaf.bits} bits already; start from real numbers")
        try:
            flat[path] = change(leaf, form)
        except ValueError as error:
            raise ValueError(f"{layer}, by rule {found[layer].path!r}: {error}") from None
    return traverse_util.unflatten_dict(flat)


def _dense(path: tuple[str, ...], leaf) -> bool:
    return path[-1] == "kernel" and len(leaf.shape) == 2


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join([*names[:limit], *["..."] * (len(names) > limit)]) or "none"
