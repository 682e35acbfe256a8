"""Kernels of vision transformers as 2:4 sparse tensor cores take them: which, their masks, few bits, bytes.

    params, masks = prune(params, "2:4")                  # of the kernels in blocks and of the patches' projection
    seen = apply(params, masks, bits=8)                   # in the forward pass: gradients vanish where masks are zero
    stored = {path: pack(kernel, "2:4", 8) for path, kernel in layers(params).items()}

Kernels are pruned along their inputs, those of a convolution as the matrix (outputs, channels x rows x columns) that it
is on GPUs. Layers are skipped by the rule of NVIDIA's apex (`contrib/sparsity/asp.py`, commit 6424da3b): outputs that
are no multiple of 8, inputs that are none of 16. Few bits are signed, a scale an output channel by its largest
magnitude, as TensorRT takes weights.

The pattern "4:8" keeps two of every four pairs of neighbours. It is what the tensor cores of Ampere take for 4 bits: an
index of 2 bits serves two weights, so that a weight takes 2.5 bits, and 3 by "2:4".
"""

import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct, traverse_util

from research.core import cost
from research.kernels.lowbit_matmul.layout import Packed, pack_codes, unpack_codes
from research.quantize import quantized, sparse24
from research.quantize.fake import fake_quantize
from research.quantize.grids import Form

LAYERS = r"^(blocks_\d+/.+|patch_embed/proj)$"
PATTERNS = {"2:4": 1, "4:8": 2}  # neighbours that are kept or pruned together
OUTPUTS, INPUTS = 8, 16  # of which sizes are multiples


def layers(params: Mapping) -> dict[str, jax.Array]:
    """Slash path of a layer -> its kernel, for all that are pruned or get few bits.

    Raises:
      ValueError: there are none.
    """
    found = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        layer = "/".join(path[:-1])
        if path[-1] == "kernel" and re.search(LAYERS, layer):
            outputs, inputs = leaf.shape[-1], leaf.size // leaf.shape[-1]
            if outputs % OUTPUTS == 0 and inputs % INPUTS == 0:
                found[layer] = leaf
    if not found:
        raise ValueError(
            f"no kernel in blocks_* or patch_embed has outputs of a multiple of {OUTPUTS} and inputs of {INPUTS}: only"
            " vision transformers (vit_*, deit*) have layers for 2:4 sparsity"
        )
    return found


def rows(kernel: jax.Array) -> jax.Array:
    """A kernel (K, N) or (height, width, C, N) as the matrix (N, K) along whose rows it is pruned."""
    return kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1)


def kernel_of(matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `rows`."""
    if len(shape) == 2:
        return matrix.T
    height, width, channels, outputs = shape
    return matrix.reshape(outputs, channels, height, width).transpose(2, 3, 1, 0)


def mask(matrix: jax.Array, pattern: str) -> jax.Array:
    """uint8 of the shape of a matrix (N, K): what keeps most magnitude.

    Raises:
      ValueError: a pattern that is none, rows that do not divide.
    """
    together = _together(pattern)
    magnitudes = jnp.sum(jnp.abs(matrix).reshape(len(matrix), -1, together), axis=-1)
    return jnp.repeat(sparse24.best_1d(magnitudes), together, axis=1)


@functools.partial(jax.jit, static_argnames="pattern")
def prune(params: Mapping, pattern: str) -> tuple[dict, dict]:
    """(parameters, zero where they are pruned; uint8 masks of `layers`, nested as the parameters are).

    Raises:
      ValueError: a pattern that is none, no layers.
    """
    found = {layer: kernel_of(mask(rows(k), pattern), k.shape) for layer, k in layers(params).items()}
    masks = traverse_util.unflatten_dict({(*layer.split("/"), "kernel"): m for layer, m in found.items()})
    return apply(params, masks), masks


def apply(params: Mapping, masks: Mapping, bits: int | None = None) -> dict:
    """`params` as the network sees them: kernels times their masks, then rounded and read back where there are bits.

    Differentiable: straight-through where the mask is one, zero elsewhere.

    Args:
      masks: as `prune` makes them; empty prunes nothing.
      bits: 2 to 8, of all `layers`; None leaves them.
    """
    flat, kept = dict(traverse_util.flatten_dict(params)), traverse_util.flatten_dict(masks)
    for path, ones in kept.items():
        flat[path] = flat[path] * ones.astype(flat[path].dtype)
    if bits is not None:
        form = Form(bits, axis=0, rule="absmax")
        for layer in layers(params):
            path = (*layer.split("/"), "kernel")
            kernel = flat[path]
            flat[path] = fake_quantize(kernel.reshape(-1, kernel.shape[-1]), form).reshape(kernel.shape)
    return traverse_util.unflatten_dict(flat)


@struct.dataclass
class Sparse:
    """A kernel with half of its weights, a pytree.

    Attributes:
      values: what is kept, in order, (K / 2, N): `Packed` codes with a scale a column, or float16.
      index: words of 2 bits a place within its four, or one a pair, (K / 2 / neighbours, N) of them.
      pattern: of PATTERNS.
      shape: of the kernel.
    """

    values: Packed | jax.Array
    index: tuple[jax.Array, ...]
    pattern: str = struct.field(pytree_node=False)
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return nbytes(self)


def pack(kernel: jax.Array, pattern: str, bits: int | None = None) -> Sparse:
    """A kernel in its compressed form, pruned where it is not: with `bits`, what `apply` rounds it to.

    Raises:
      ValueError: a pattern that is none, rows that do not divide.
    """
    together, matrix = _together(pattern), rows(kernel)
    groups = mask(matrix, pattern)[:, ::together]
    # Neighbours that are kept together have one index.
    parts = [sparse24.compress(matrix[:, first::together], groups) for first in range(together)]
    values = jnp.stack([part.values for part in parts], axis=-1).reshape(len(matrix), -1).T
    if bits is None:
        values = values.astype(jnp.float16)
    else:
        values = quantized.pack(quantized.quantize(values, Form(bits, axis=0, rule="absmax")))
    return Sparse(values, pack_codes(parts[0].index.T, 2), pattern, kernel.shape)


def unpack(stored: Sparse, dtype=jnp.float32) -> jax.Array:
    """The kernel, zeros included."""
    together, values = PATTERNS[stored.pattern], stored.values
    if isinstance(values, Packed):
        values = quantized.dequantize(quantized.unpack(values))
    values = values.astype(dtype).T
    index = unpack_codes(stored.index, 2, values.shape[1] // together).T.astype(jnp.uint8)
    whole = lambda part: sparse24.decompress(sparse24.Compressed(part, index))
    parts = [whole(values[:, first::together]) for first in range(together)]
    return kernel_of(jnp.stack(parts, axis=-1).reshape(len(values), -1), stored.shape)


def export(params: Mapping, pattern: str | None, bits: int | None = None) -> dict:
    """All parameters as they are stored: `Sparse` or `Packed` for `layers`, float16 for the rest.

    Args:
      pattern: of the pruned kernels; None where none is.
      bits: None keeps the weights in float16.
    """
    flat = {path: leaf.astype(jnp.float16) for path, leaf in traverse_util.flatten_dict(params).items()}
    flat |= {(*layer.split("/"), "kernel"): _stored(k, pattern, bits) for layer, k in layers(params).items()}
    return traverse_util.unflatten_dict(flat)


def stored_bytes(params: Mapping, pattern: str | None, bits: int | None = None) -> dict[str, int]:
    """Bytes of {"dense": the parameters as they are, "stored": those of `export`, "dense_layers", "stored_layers"}.

    `layers` are those that are pruned or rounded. Nothing is computed: parameters may be shapes.
    """
    chosen = layers(params)
    stored = sum(_stored_bytes(kernel.shape, pattern, bits) for kernel in chosen.values())
    rest = cost.params_count(params) - cost.params_count(chosen)
    return {
        "dense": nbytes(params),
        "stored": stored + 2 * rest,
        "dense_layers": nbytes(chosen),
        "stored_layers": stored,
    }


def nbytes(tree) -> int:
    """Bytes of all arrays, or shapes of arrays, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _stored(kernel: jax.Array, pattern: str | None, bits: int | None) -> Sparse | Packed | jax.Array:
    if pattern is not None:
        return pack(kernel, pattern, bits)
    if bits is None:
        return kernel.astype(jnp.float16)
    return quantized.pack(quantized.quantize(rows(kernel).T, Form(bits, axis=0, rule="absmax")))


@functools.cache
def _stored_bytes(shape: tuple[int, ...], pattern: str | None, bits: int | None) -> int:
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nbytes(jax.eval_shape(lambda kernel: _stored(kernel, pattern, bits), kernel))


def _together(pattern: str) -> int:
    if pattern not in PATTERNS:
        raise ValueError(f"pattern: {pattern!r} is none of {', '.join(PATTERNS)}")
    return PATTERNS[pattern]
