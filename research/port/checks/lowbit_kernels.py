"""Golden checks of the low-bit formats and products: packings of checkpoints, 2:4 sparsity, products of few bits."""

import re

import jax.numpy as jnp
import numpy as np

from research.kernels.binary_matmul import pack_signs
from research.kernels.lowbit_matmul import reference
from research.kernels.lowbit_matmul.layout import Packed, codes_of
from research.kernels.lowbit_matmul.reference import Tokens
from research.port.verify import Golden
from research.quantize import layouts, sparse24
from research.quantize.quantized import Quantized, pack


def packing(golden: Golden) -> dict[str, np.ndarray]:
    """Words of every layout and number of bits that a key names, which are read back first."""
    outputs = {}
    for name in sorted({key.partition("/")[0] for key in golden.y}):
        layout, bits = name.partition("_b")[::2]
        if layout == "marlin":
            q, scales = (golden.x[f"marlin_{part}"].T for part in ("q", "scale"))
            weight = layouts.from_codes(q, scales, None, 4, None)
        else:
            q, zeros, scales = (golden.x[f"{part}_b{bits}"].T for part in ("q", "zero", "scale"))
            weight = layouts.from_codes(q, scales, zeros, int(bits), golden.meta.get("group"))
        words = layouts.LAYOUTS[layout].write(weight)
        again = layouts.LAYOUTS[layout].read(words, weight.bits, weight.group)
        np.testing.assert_array_equal(again.codes, weight.codes)
        outputs |= {f"{name}/{part}": array for part, array in words.items() if f"{name}/{part}" in golden.y}
    return outputs


def sparsity(golden: Golden) -> dict[str, np.ndarray]:
    """The masks that keys name, of matrices and of kernels of images, and the compressed form of the matrix."""
    masks = {"1d": sparse24.best_1d, "2d_greedy": sparse24.greedy_2d, "2d_best": sparse24.best_2d}
    outputs = {}
    for key in golden.y:
        found = re.fullmatch(r"(?:ref/)?(?:(\w+)_)?m4n2_(\w+)", key)
        if found:
            # The official code makes masks of float32.
            w = jnp.asarray(golden.x[f"{found[1]}_w" if found[1] else "w"], jnp.float32)
            outputs[key] = np.asarray(sparse24.of_inputs(masks[found[2]], w))
    compressed = sparse24.compress(jnp.asarray(golden.x["w"]), sparse24.best_1d(jnp.asarray(golden.x["w"])))
    return outputs | {"ref/compressed_values": compressed.values, "ref/compressed_index": compressed.index}


def lowbit_matmul(golden: Golden) -> dict[str, np.ndarray]:
    """Products of every kind that a key names, by the reference."""
    outputs = {}
    for name in sorted({key.partition("/")[0] for key in golden.y}):
        x = {key.partition("/")[2]: jnp.asarray(v) for key, v in golden.x.items() if key.startswith(f"{name}/")}
        if name == "xnor":
            found = _xnor(golden, x)
        elif re.fullmatch(r"w\d+a16", name):
            found = _weight_only(golden, name, x)
        else:
            found = _integers(golden, name, x)
        outputs |= {f"{name}/{part}": value for part, value in found.items()}
    return {key: value for key, value in outputs.items() if key in golden.y}


def _weight(codes, scales, zeros, bits: int) -> Packed:
    """A weight from the file's (N, K) codes, (N, G) or (N,) scales and zero points."""
    scales = scales.reshape(len(codes), -1).T
    zeros = None if zeros is None else zeros.reshape(len(codes), -1).T.astype(scales.dtype)
    k = codes.shape[1]
    return pack(Quantized(codes.T, scales, zeros, None, bits, 0, k // len(scales), k))


def _weight_only(golden: Golden, name: str, x: dict) -> dict:
    weight = _weight(x["q"], x["scale"], x.get("zero"), int(re.match(r"w(\d+)", name)[1]))
    inputs = jnp.asarray(golden.x["x"])
    return {
        "dequant": reference.dequantize(weight, inputs.dtype).T,
        "out": reference.weight_only(inputs, weight),
        "group_xsum": reference.group_sums(inputs, weight),
    }


def _integers(golden: Golden, name: str, x: dict) -> dict:
    """`w8a8_actzero` and the like have the codes of `w8a8`, and a zero point of activations on top."""
    base, bits, _ = re.match(r"(w(\d+)a(\d+))", name).groups()
    x = {key.partition("/")[2]: jnp.asarray(v) for key, v in golden.x.items() if key.startswith(f"{base}/")} | x
    weight = _weight(x["wq"], x["sw"], x.get("zw"), int(bits))
    zeros = x["zx"].reshape(-1, 1).astype(jnp.int32) if "zx" in x else None
    tokens = Tokens(x["xq"], x["sx"].reshape(-1, 1), zeros)
    if zeros is None:  # the same codes are what the op makes of the inputs
        own = reference.quantize_tokens(jnp.asarray(golden.x["x"]), int(re.search(r"a(\d+)", name)[1]))
        np.testing.assert_array_equal(own.codes, tokens.codes)
    return {
        "acc": jnp.sum(reference.accumulators(tokens.codes, weight), axis=0, dtype=jnp.int32),
        "out": reference.integers(tokens, weight),
        "correction_colsum": jnp.sum(codes_of(weight), axis=0, dtype=jnp.int32),
    }


def _xnor(golden: Golden, x: dict) -> dict:
    inputs, weight = (jnp.asarray(golden.x[name]) for name in ("x", "w"))
    k = inputs.shape[1]
    left, right = pack_signs(inputs), pack_signs(weight)
    product = reference.binary.binary_matmul(left, right, k, None)
    return {
        "acc": product,
        "out": reference.xnor(left, right, k, x["alpha"]),
        "x_words": left.view(jnp.int32),
        "w_words": right.view(jnp.int32),
        "hamming": (k - product) // 2,
    }


CHECKS = {"packing": packing, "sparse24": sparsity, "lowbit_matmul": lowbit_matmul}
