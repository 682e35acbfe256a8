"""BiMLP for inference with one bit a weight: kernels as packed signs and scales, layers as counts of bits.

    packed, rest = pack(variables)                  trained or frozen weights
    logits, endpoints = apply(model, packed, rest, images)

Kernels of 1x1, most of the network, become `research.kernels.binary_matmul`: activations are packed as they come, and
the integer sums equal those of the float layer. A kernel of two inputs to an output and tap (`tfc`) leaves nothing to
count: it is stored packed along its outputs and unpacked where it is used. Depthwise kernels keep their values in this
network (see `research.layers.binary.xnor`) and stay as they are.

Layers of BiMLP-S on a CPU with AVX-512 (2 cores shared with other work, so processor time; float32, 8 images, ms),
against the product of quantised float32 numbers, with what quantising and packing the activations takes:

    map     channels        float   packed ternary   packed sign
    56x56   64 -> 64        3.4     2.8              1.7
    56x56   64 -> 256       8.9     5.5              4.8
    56x56   256 -> 64       12.8    10.9             6.9
    28x28   128 -> 512      7.7     2.7              2.4
    14x14   320 -> 1280     11.3    8.8              8.8
    7x7     512 -> 2048     6.9     2.3              2.2
    7x7     2048 -> 512     7.6     2.0              1.8
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import linen as nn
from flax import struct, traverse_util

from research.backbones import bimlp
from research.kernels import binary_matmul as bits
from research.layers import binary
from research.layers.binary import BinaryConv
from research.layers.norm import accumulation_dtype


@struct.dataclass
class PackedKernel:
    """A quantised kernel (kh, kw, inputs, outputs).

    Attributes:
      signs: uint32, (outputs, words of inputs) for 1x1; (kh, kw, inputs, words of outputs) for larger ones.
      scales: the magnitude of an output's weights, float32 (kh, kw, 1, outputs).
      shape: of the kernel.
    """

    signs: jax.Array
    scales: jax.Array
    shape: tuple[int, int, int, int] = struct.field(pytree_node=False)


def pack_kernel(kernel: jax.Array) -> PackedKernel:
    """The packed form of a kernel, latent or frozen; weights of 0 count as positive, see `pack`."""
    signs, scales = binary.signs_and_scales(kernel)
    rows = signs[0, 0].T if kernel.shape[:2] == (1, 1) else signs
    return PackedKernel(bits.pack_signs(rows), scales, tuple(kernel.shape))


def unpack_kernel(packed: PackedKernel) -> jax.Array:
    """The quantised kernel, (kh, kw, inputs, outputs) float32: what `xnor` makes of the latent one."""
    _, _, inputs, outputs = packed.shape
    if packed.shape[:2] == (1, 1):
        return bits.unpack_signs(packed.signs, inputs).T[None, None] * packed.scales
    return bits.unpack_signs(packed.signs, outputs) * packed.scales


def pack(variables: Mapping) -> tuple[dict[str, PackedKernel], dict]:
    """Variables of a BiMLP of two quantisers -> (packed kernels by slash path of their layer, the other variables).

    Raises:
      ValueError: a weight of exactly 0 among others, which one bit cannot say.
    """
    packed, rest = {}, {}
    for path, leaf in traverse_util.flatten_dict(dict(variables["params"])).items():
        if not bimlp.is_binary(path) or leaf.shape[2] == 1:
            rest[path] = leaf
            continue
        signs, scales = jax.device_get(binary.signs_and_scales(leaf))
        layer = "/".join(path[:-1])
        if np.any((signs == 0) & (scales != 0)):
            raise ValueError(f"{layer}/kernel: a weight is exactly 0, which one bit cannot hold: give it a sign first")
        packed[layer] = pack_kernel(leaf)
    return packed, {**variables, "params": traverse_util.unflatten_dict(rest)}


def integers(x: jax.Array, packed: PackedKernel, activation: str) -> jax.Array:
    """Sums of quantised activations by signs, of a 1x1 kernel: (..., inputs) -> (..., outputs) int32."""
    x = binary.ACTIVATIONS[activation](x)
    # Only a ternary activation has zeros.
    nonzero = bits.pack_bits(x != 0) if activation == "ternary" else None
    return bits.binary_matmul(bits.pack_signs(x), packed.signs, packed.shape[2], nonzero)


def convolved(x: jax.Array, packed: PackedKernel, layer: BinaryConv) -> jax.Array:
    """What `layer` computes, from its packed kernel: (B, H, W, C) -> (B, H, W, outputs)."""
    x = x.astype(layer.dtype)
    if packed.shape[:2] == (1, 1):
        sums = integers(x, packed, layer.activation).astype(accumulation_dtype(x))
        return (sums * packed.scales.astype(sums.dtype)).astype(layer.dtype)
    # The layer itself, on its quantised kernel as it is.
    plain = layer.clone(weights="real", parent=None, name=None)
    return plain.apply({"params": {"kernel": unpack_kernel(packed)}}, x)


def apply(model: bimlp.BiMLP, packed: Mapping[str, PackedKernel], rest: Mapping, images: jax.Array):
    """Evaluation, `model.apply` with packed kernels: (B, H, W, 3) -> (logits, endpoints).

    Raises:
      ValueError: a model whose activations or weights are not quantised.
    """
    if model.activation not in binary.QUANTISED or model.weights != "xnor":
        raise ValueError(
            f"activation={model.activation!r}, weights={model.weights!r} are not both binary: the packed form is that "
            f"of weights='xnor' with an activation of {', '.join(binary.QUANTISED)}"
        )

    def call(method, args, kwargs, context):
        path = "/".join(context.module.path)
        if isinstance(context.module, BinaryConv) and path in packed:
            return convolved(args[0], packed[path], context.module)
        return method(*args, **kwargs)

    with nn.intercept_methods(call):
        return model.apply(rest, images)
