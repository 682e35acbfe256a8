"""Matrix product with weights of 1 to 8 bits, which stay packed in memory.

    weight = quantized.pack(quantized.quantize(kernel, form))              # kernel (K, N), of research.quantize
    y = lowbit_matmul(x, weight, bias)                                     # W4A16 and the like
    y = lowbit_matmul(x, weight, bias, activation_bits=8)                  # W8A8, W4A8; 4 for W4A4

Scales, zero points and bias are part of the op. Where activations have bits, each token is quantised by its largest
magnitude and products are exact integers. The gradient is that of the activations and the bias alone, as if they had
not been quantised (straight-through): the weight is a constant. `xnor_matmul` takes one bit of both.

`reference.py` is the meaning and the form that XLA compiles, `layout.py` says how the weights lie, `KERNELS` lists the
platforms that have a form of their own.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from research.kernels import dispatch
from research.kernels.binary_matmul import words
from research.kernels.lowbit_matmul import cpu, gpu, reference, tpu
from research.kernels.lowbit_matmul.layout import PLANES, Packed, pack_codes, unpack_codes
from research.kernels.lowbit_matmul.tpu import Blocks
from research.layers.norm import accumulation_dtype

__all__ = ["FORMS", "PLANES", "Blocks", "Packed", "lowbit_matmul", "pack_codes", "unpack_codes", "xnor_matmul"]

ACTIVATION_BITS = tuple(range(2, 9))
FORMS = ("xla", "kernel", "mosaic_gpu", "interpret")
COLUMNS = "tensor"  # the axis of a mesh that splits outputs


class Kernel(NamedTuple):
    """What a platform has of its own.

    Fields:
      product: (x (M, K), weight, bias (N,) or None, activation bits or None) -> (M, N) in the dtype of x or wider; the
        weight has no `order`, the columns of x are in it.
      refusal: (x, weight, activation bits) -> why it cannot take them; None where it can.
    """

    product: Callable[..., jax.Array]
    refusal: Callable[..., str | None]


def _hopper(blocks: gpu.Blocks | None) -> Kernel:
    """The kernel for Hopper, which leaves bias and quantised inputs to XLA."""
    return Kernel(
        lambda x, weight, bias, bits: _biased(gpu.weight_only(x, weight, blocks), bias),
        lambda x, weight, bits: gpu.refusal(x, weight, blocks) if bits is None else "it takes no quantised activations",
    )


def _mosaic(blocks: Blocks | None, interpret: bool = False) -> Kernel:
    """The kernel for TPUs with the sizes that are given, or those of this process's devices."""
    options = lambda: {"blocks": dispatch.sizes(tpu.BLOCKS, Blocks()) if blocks is None else blocks}
    return Kernel(
        lambda *operands: tpu.product(*operands, **options(), interpret=interpret),
        lambda *operands: tpu.refusal(*operands, **options()),
    )


# By the platform that a program is lowered for; `_hopper` has to be asked for, as it has not been run on hardware.
KERNELS: dict[str, Kernel] = {"cpu": Kernel(cpu.product, cpu.refusal), "tpu": _mosaic(None)}


def lowbit_matmul(
    x: jax.Array,
    weight: Packed,
    bias: jax.Array | None = None,
    *,
    activation_bits: int | None = None,
    form: str | None = None,
    blocks: Blocks | gpu.Blocks | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """(..., K) by a packed weight (K, N), plus a bias (N,) -> (..., N) in the dtype of x.

    Args:
      activation_bits: 2 to 8 quantises x by token; None leaves it.
      form: "xla" everywhere; "kernel", the form of `KERNELS` of the platform that the program is lowered for, and XLA's
        where there is none or it refuses the operands; "mosaic_gpu", as "kernel", and on GPUs, which have to be
        Hopper's, that of `gpu.py`; "interpret", the kernel for TPUs on any platform, slowly, for tests. By default
        "kernel" where there is a mesh, or no more than one device, and "xla" otherwise: a kernel in a program that JAX
        partitions by itself does not compile.
      blocks: sizes of the kernel for TPUs in place of those of `tpu.BLOCKS`, or of `gpu.BLOCKS` with "mosaic_gpu", as
        programs need that are compiled ahead of time for other devices than this process has.
      mesh: runs through `shard_map` on it, also where it has one device: the first axis of x split by `data` and
        `fsdp`, outputs by `tensor`, each where it divides.
    Raises:
      ValueError: shapes that do not fit, other bits, an unknown form; operands that an interpreted kernel does not
        take.
    """
    k, n = weight.shape
    if x.shape[-1:] != (k,) or (bias is not None and bias.shape != (n,)):
        shape = None if bias is None else bias.shape
        raise ValueError(f"shapes do not fit: x {x.shape}, weight {(k, n)}, bias {shape}")
    if activation_bits is not None and activation_bits not in ACTIVATION_BITS:
        raise ValueError(f"activation_bits: {activation_bits} is not from 2 to 8, nor None for real activations")
    if form is not None and form not in FORMS:
        raise ValueError(f"form: {form!r} is none of {', '.join(FORMS)}")
    form = form or ("kernel" if mesh is not None or _alone() else "xla")
    call = functools.partial(_flat, options=(activation_bits, form, blocks))
    return call(x, weight, bias) if mesh is None else _sharded(call, mesh, x, weight, bias)


def xnor_matmul(x: jax.Array, weight: jax.Array, alpha: jax.Array) -> jax.Array:
    """Signs of (..., K) by packed signs (N, words of K), times alpha (N,) -> (..., N) in the dtype of alpha.

    No gradient. Source: Rastegari et al. 2016, "XNOR-Net" (arXiv 1603.05279), without the scales of inputs.

    Raises:
      ValueError: shapes that do not fit.
    """
    k = x.shape[-1]
    if weight.dtype != jnp.uint32 or weight.shape != (alpha.size, words(k)):
        raise ValueError(
            f"weight: {weight.dtype} {weight.shape} is not uint32 {(alpha.size, words(k))}: use pack_signs"
        )
    signs = reference.binary.pack_signs(x.reshape(-1, k))
    return reference.xnor(signs, weight, k, alpha).reshape(*x.shape[:-1], alpha.size)


def _alone() -> bool:
    """Whether no program of this process can be partitioned."""
    return jax.device_count() == 1 and jax.sharding.get_abstract_mesh().size <= 1


def _flat(x: jax.Array, weight: Packed, bias: jax.Array | None, options: tuple) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    return _product(options, rows, weight, bias).astype(x.dtype).reshape(*x.shape[:-1], -1)


def _sharded(call: Callable, mesh: Mesh, x: jax.Array, weight: Packed, bias: jax.Array | None) -> jax.Array:
    """`call` on every device's own tokens and outputs."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = dispatch.IMAGES if x.ndim > 1 and x.shape[0] % devices == 0 else None
    columns = COLUMNS if weight.shape[1] % mesh.shape[COLUMNS] == 0 else None
    of_weight = lambda a: PartitionSpec(None, columns if a.ndim == 2 and a.shape[1] > 1 else None)
    specs = jax.tree.map(of_weight, weight).replace(order=None if weight.order is None else PartitionSpec())
    leading = [tokens, *[None] * (x.ndim - 2)] if x.ndim > 1 else []
    # Kernels say nothing of which axes their results vary over when they are interpreted.
    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(PartitionSpec(*leading), specs, PartitionSpec(columns)),
        out_specs=PartitionSpec(*leading, columns),
        check_vma=False,
    )
    return mapped(x, weight, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(options: tuple, x: jax.Array, weight: Packed, bias: jax.Array | None) -> jax.Array:
    """Options: activation bits, form, blocks."""
    bits, form, blocks = options
    x, weight = reference.in_order(x, weight), weight.replace(order=None)
    own = {"cuda": _hopper(blocks)} if form == "mosaic_gpu" else {"tpu": _mosaic(blocks, form == "interpret")}
    kernels = {} if form == "xla" else KERNELS | own
    refused = {name: kernel.refusal(x, weight, bits) for name, kernel in kernels.items()}
    call = lambda product: lambda x, weight, bias: product(x, weight, bias, bits).astype(x.dtype)
    fit = {name: call(kernels[name].product) for name, reason in refused.items() if reason is None}
    if form != "interpret":
        return jax.lax.platform_dependent(x, weight, bias, **fit, default=call(_reference))
    if reason := refused["tpu"]:
        raise ValueError(f'the kernel cannot run: {reason}; take form="xla"')
    return fit["tpu"](x, weight, bias)


def _reference(x: jax.Array, weight: Packed, bias: jax.Array | None, bits: int | None) -> jax.Array:
    if bits is None:
        return _biased(reference.weight_only(x, weight), bias)
    return _biased(reference.integers(reference.quantize_tokens(x, bits), weight), bias)


def _biased(product: jax.Array, bias: jax.Array | None) -> jax.Array:
    return product if bias is None else product + bias.astype(product.dtype)[None]


def _forward(options, x, weight, bias):
    # Dtypes are kept as those of empty arrays: residuals are arrays.
    empty = lambda array: None if array is None else jnp.zeros((0,), array.dtype)
    return _product(options, x, weight, bias), (empty(x), weight, empty(bias))


def _backward(options, kept, cotangent):
    of_x, weight, of_bias = kept
    wide = cotangent.astype(accumulation_dtype(cotangent))
    gradient = wide @ reference.dequantize(weight, wide.dtype).T
    if weight.order is not None:
        gradient = jnp.zeros_like(gradient).at[:, weight.order].set(gradient)
    bias = None if of_bias is None else jnp.sum(wide, axis=0).astype(of_bias.dtype)
    return gradient.astype(of_x.dtype), jax.tree.map(_no_gradient, weight), bias


def _no_gradient(leaf: jax.Array):
    real = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if real else np.zeros(leaf.shape, jax.dtypes.float0)


_product.defvjp(_forward, _backward)
