"""The kernel for Hopper, interpreted, against its meaning in float32; its lowering for CUDA, which needs no GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import NamedSharding, PartitionSpec

from research.core import sharding
from research.kernels import dispatch
from research.kernels.token_attention import gpu, reference, token_attention

BF16 = jnp.bfloat16
CALLS = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]


def drawn(batch, heads, tokens, dim, dtype=BF16):
    rng = np.random.default_rng(tokens)
    return [jnp.asarray(rng.normal(size=(batch, heads, tokens, dim)), dtype) for _ in range(3)]


def interpreted(q, k, v, bias, row=True, blocks=None):
    blocks = gpu.Blocks() if blocks is None else blocks
    kernel = lambda *x: gpu.token_attention(*x, row, blocks, interpret=InterpretGPUParams())
    return jax.jit(kernel)(q, k, v, bias)


def assert_exact(found, operands, bias, dtype=BF16):
    """Of the same halves in float32: the row to float32's rounding, the result to that of weights and of itself."""
    expected = reference.token_attention(*[x.astype(jnp.float32) for x in operands], bias, found.row is not None)
    assert found.out.dtype == dtype
    np.testing.assert_allclose(found.out.astype(jnp.float32), expected.out, rtol=2e-2, atol=4e-3)
    for one, other in zip(found[1:], expected[1:], strict=True):
        if other is not None:
            assert one.dtype == jnp.float32
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# More steps than stages and ragged parts; one stage; as many keys of padding as a block may have.
@pytest.mark.parametrize(
    "batch,heads,tokens,dim,blocks,dtype",
    [
        (2, 1, 130, 32, None, BF16),
        (1, 2, 65, 64, gpu.Blocks(stages=1), jnp.float16),
        (1, 1, 129, 128, gpu.Blocks(128), BF16),
    ],
)
def test_the_kernel_is_its_reference(batch, heads, tokens, dim, blocks, dtype):
    operands = drawn(batch, heads, tokens, dim, dtype)
    bias = jnp.log(jnp.asarray(np.random.default_rng(0).integers(1, 9, (batch, 1, 1, tokens)), jnp.float32))
    assert_exact(interpreted(*operands, bias, blocks=blocks), operands, bias, dtype)


def test_hidden_keys_get_nothing_even_where_they_fill_a_block():
    """Whole first block hidden; a bias for all images in common; scores far from 0, whose maximum comes last."""
    q, k, v = drawn(1, 1, 100, 16)
    k = k * jnp.linspace(0, 30, 100, dtype=BF16)[None, None, :, None]
    bias = jnp.where(jnp.arange(100) < 70, -jnp.inf, 0.0)[None, None, None]
    found = interpreted(q, k, v, bias)
    assert not np.any(found.row[..., :70])
    assert_exact(found, (q, k, v), bias)


def test_without_class_row_and_bias_there_is_attention_alone():
    operands = drawn(1, 1, 20, 16)
    found = interpreted(*operands, None, row=False)
    assert found.row is None and found.squares is None
    assert_exact(found, operands, None)


def text(shape, dtype=BF16, mesh=None, form="mosaic_gpu", platform="cuda", **options):
    operand = jax.ShapeDtypeStruct(shape, dtype)
    size = jax.ShapeDtypeStruct((shape[0], shape[2]), jnp.float32)
    call = jax.jit(lambda *x: token_attention(*x, form=form, mesh=mesh, **options))
    return export.export(call, platforms=[platform], disabled_checks=CALLS)(*[operand] * 3, size).mlir_module()


@pytest.mark.parametrize(
    "shape,dtype,options",
    [
        ((64, 6, 197, 64), BF16, {}),
        ((2, 3, 71, 32), jnp.float16, {"class_row": False}),
        ((1, 12, 1370, 128), BF16, {"blocks": gpu.Blocks(128)}),
        ((1, 1, 33, 16), BF16, {"blocks": gpu.Blocks(256, 3)}),
        ((2, 2, 65, 48), BF16, {"blocks": gpu.Blocks(192, 1)}),
    ],
)
def test_it_lowers_for_cuda(shape, dtype, options):
    """DeiT-S at a batch of 64; ragged tokens, other heads, dtypes and sizes of blocks. Nothing is N x N."""
    found = text(shape, dtype, **options)
    assert "@mosaic_gpu" in found
    assert f"{shape[2]}x{shape[2]}x" not in found


def test_gpus_take_xlas_form_unless_asked():
    shape = (4, 2, 17, 64)
    mesh = sharding.mesh({"data": 4, "tensor": 2})
    for options in ({"form": None}, {"form": "pallas"}, {"form": None, "mesh": mesh}):
        assert "@mosaic_gpu" not in text(shape, **options)
    assert "@mosaic_gpu" in text(shape, mesh=mesh)
    assert "@mosaic_gpu" not in text(shape, platform="cpu")


def test_elsewhere_it_is_xlas_form_with_its_gradients():
    mesh = sharding.mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    q, k, v = drawn(2, 2, 17, 16)
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "tensor"))) for x in (q, k, v)]

    def loss(form, mesh, *operands):
        found = token_attention(*operands, form=form, mesh=mesh)
        return jnp.sum(jnp.square(found.out.astype(jnp.float32))) + jnp.sum(found.weighted**2)

    expected = jax.grad(lambda *x: loss("xla", None, *x), (0, 1, 2))(q, k, v)
    found = jax.grad(lambda *x: loss("mosaic_gpu", mesh, *x), (0, 1, 2))(*placed)
    for one, other in zip(found, expected, strict=True):
        assert np.any(other)
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"dtype": jnp.float32}, "float32"),
        ({"shape": (1, 1, 5, 24)}, "channels, not 24"),
        ({"shape": (1, 1, 5, 256)}, "channels, not 256"),
        ({"bias": jnp.zeros((1, 5, 5))}, "bias of keys alone"),
        ({"blocks": gpu.Blocks(100)}, "keys=100"),
        ({"blocks": gpu.Blocks(256, 4), "shape": (1, 1, 5, 128)}, "shared memory"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(change, message):
    options = {"shape": (1, 1, 5, 64), "dtype": BF16} | change
    operands = drawn(*options.pop("shape"), options.pop("dtype"))
    with pytest.raises(ValueError, match=message):
        token_attention(*operands, form="mosaic_gpu", **options)


def test_sizes_are_those_of_the_kind_of_device():
    kind = jax.devices()[0].device_kind
    assert dispatch.sizes({kind: gpu.Blocks(64), "other": gpu.Blocks(128)}, gpu.Blocks()) == gpu.Blocks(64)
    assert dispatch.sizes({"other": gpu.Blocks(128)}, gpu.Blocks()) == gpu.Blocks()


def test_shared_memory_is_counted():
    assert gpu.shared_bytes(64, gpu.Blocks()) == (8 + 8 + 32) * 1024 + 512 + 16 * 1024
