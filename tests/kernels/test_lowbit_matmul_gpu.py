"""The kernel for Hopper, interpreted, against its meaning in float32; what lowers for CUDA, which needs no GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from research.core import sharding
from research.kernels.lowbit_matmul import Packed, gpu, lowbit_matmul, pack_codes, reference

BF16 = jnp.bfloat16
CALLS = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]


def packed(k, n, bits, group, zeros, dtype=jnp.float32):
    """A weight (K, N); group 0 is one scale for all."""
    rng = np.random.default_rng(k + n + bits)
    shape = (-(-k // group), n) if group else (1, 1)
    points = jnp.asarray(rng.integers(0, 2**bits + 1, shape), dtype) if zeros else None
    scales = jnp.asarray(rng.uniform(-1.5, 1.5, shape), dtype)
    codes = jnp.asarray(rng.integers(0, 2**bits, (k, n)))
    return Packed(pack_codes(codes, bits), scales, points, None, bits, group or k, k)


def abstract(*args, **options):
    return jax.eval_shape(lambda: packed(*args, **options))


def drawn(m, k):
    return jnp.asarray(np.random.default_rng(m).normal(size=(m, k)), BF16)


# Ragged rows, outputs and inputs, blocks of 256, 128 and 32 inputs, more steps than stages, inputs shared by programs,
# rows of several programs, a scale for part of a block, for more than one, and for all; more than one plane.
@pytest.mark.parametrize(
    "m,weight,blocks",
    [
        (3, packed(500, 70, 4, 128, True), gpu.Blocks(stages=1, programs=1)),
        (17, packed(768, 64, 4, 384, False, jnp.float16), gpu.Blocks(tokens=16, programs=4)),
        (2, packed(120, 64, 3, 32, True, BF16), gpu.Blocks(128)),
        (1, packed(96, 1, 2, 0, False), gpu.Blocks(stages=2, programs=1)),
        (1, packed(64, 64, 8, 32, True), gpu.Blocks()),
        (1, packed(32, 64, 8, 0, False), gpu.Blocks()),
        (1, packed(64, 64, 1, 64, False), gpu.Blocks()),
    ],
    ids=lambda value: f"W{value.bits}" if isinstance(value, Packed) else "",
)
def test_the_kernel_is_its_reference(m, weight, blocks):
    """Codes less zero points are exact, so that nothing but float32 sums in another order is between the two."""
    x = drawn(m, weight.length)
    assert gpu.refusal(x, weight, blocks) is None
    found = jax.jit(lambda *x: gpu.weight_only(*x, blocks, interpret=InterpretGPUParams()))(x, weight)
    expected = reference.weight_only(x.astype(jnp.float32), weight)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.max(np.abs(expected)))


def text(call, *operands, platform="cuda"):
    leaves, tree = jax.tree.flatten(operands)
    flat = jax.jit(lambda *leaves: call(*jax.tree.unflatten(tree, leaves)))
    return export.export(flat, platforms=[platform], disabled_checks=CALLS)(*leaves).mlir_module()


# Layers of LLaMA-7B by AutoGPTQ's and AutoAWQ's formats, decoded and in batches; other bits, blocks and scales.
@pytest.mark.parametrize(
    "m,weight,blocks",
    [
        (1, abstract(4096, 11008, 4, 128, True, dtype=jnp.float16), None),
        (64, abstract(11008, 4096, 4, 128, True), gpu.Blocks(128, stages=3)),
        (40, abstract(4096, 4096, 3, 64, False), None),
        (300, abstract(4096, 128, 2, 4096, True, dtype=BF16), None),
        (8, abstract(1184, 65, 8, 32, True), None),
    ],
    ids=lambda value: f"W{value.bits}" if isinstance(value, Packed) else "",
)
def test_it_lowers_for_cuda(m, weight, blocks):
    x = jax.ShapeDtypeStruct((m, weight.length), BF16)
    assert gpu.refusal(x, weight, blocks) is None
    found = text(lambda *x: gpu.weight_only(*x, blocks), x, weight)
    assert "@mosaic_gpu" in found
    assert f"{weight.length}x{weight.shape[1]}xbf16" not in found  # the weight is nowhere whole in real numbers


def test_gpus_take_xlas_form_unless_asked():
    x, weight = jax.ShapeDtypeStruct((8, 64), BF16), abstract(64, 128, 4, 32, True)
    mesh = sharding.mesh({"data": 4, "tensor": 2})
    found = lambda platform="cuda", **options: text(
        functools.partial(lowbit_matmul, **options), x, weight, platform=platform
    )
    assert "@mosaic_gpu" not in found(form="kernel") + found(mesh=mesh)
    assert "@mosaic_gpu" not in found(form="mosaic_gpu", activation_bits=8) + found("cpu", form="mosaic_gpu")
    assert "@mosaic_gpu" in found(form="mosaic_gpu", mesh=mesh, blocks=gpu.Blocks(64, 16, 1, 1))


def test_its_gradient_is_xlas():
    x, weight = drawn(3, 64), packed(64, 5, 4, 32, True)
    weight = weight.replace(order=jnp.asarray(np.random.default_rng(0).permutation(64)))
    bias = jnp.arange(5, dtype=BF16)

    def loss(x, bias, form):
        return jnp.sum(jnp.square(lowbit_matmul(x, weight, bias, form=form).astype(jnp.float32)))

    lowered = text(lambda x, bias: jax.value_and_grad(loss, (0, 1))(x, bias, "mosaic_gpu"), x, bias)
    assert "@mosaic_gpu" in lowered
    # Elsewhere it is the form of the platform, rounded as all forms are.
    both = jax.jit(lambda x, bias: [jax.grad(loss, (0, 1))(x, bias, form) for form in ("xla", "mosaic_gpu")])
    for one, other in zip(*both(x, bias), strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        assert np.any(one)
        np.testing.assert_allclose(other, one, rtol=2e-2, atol=2e-2 * np.max(np.abs(one)))


@pytest.mark.parametrize("bits", range(1, 9))
def test_xlas_form_lowers_for_cuda(bits):
    """Weights of all bits, inputs as they are and quantised, which is all that GPUs run unless they are asked."""
    x, weight = jax.ShapeDtypeStruct((3, 256), BF16), abstract(256, 64, bits, 128, True)
    assert "@mosaic_gpu" not in text(reference.weight_only, x, weight)
    quantised = lambda x, weight: reference.integers(reference.quantize_tokens(x, max(bits, 2)), weight)
    assert "xi32>" in text(quantised, x, weight)  # sums are integers


@pytest.mark.parametrize(
    "change,message",
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"m": 0}, "nothing"),
        ({"group": 48}, "multiple of 32 inputs, not 48"),
        ({"blocks": gpu.Blocks(96)}, "columns=96"),
        ({"blocks": gpu.Blocks(tokens=8)}, "tokens=8"),
        ({"blocks": gpu.Blocks(stages=0)}, "stages=0"),
        ({"blocks": gpu.Blocks(128, 256, 4, 1), "m": 256}, "shared memory"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(change, message):
    options = {"m": 2, "dtype": BF16, "group": 64, "blocks": None} | change
    x = jax.ShapeDtypeStruct((options["m"], 1024), options["dtype"])
    assert message in gpu.refusal(x, abstract(1024, 64, 4, options["group"], True), options["blocks"])


def test_shared_memory_is_counted():
    """Result, then in each of four stages words, scales and zero points of two groups, and 16 rows of inputs."""
    x, weight = jax.ShapeDtypeStruct((1, 4096), BF16), abstract(4096, 4096, 4, 128, True)
    assert gpu.shared_bytes(x, weight, gpu.Blocks()) == 64 * 16 * 4 + 4 * (32 * 64 * 4 + 2 * 2 * 64 * 4 + 256 * 16 * 2)
