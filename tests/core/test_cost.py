"""Counts against closed forms, published figures and XLA's own; peaks against published ones."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from research.core import cost

F32 = jnp.float32


def shape(*dims, dtype=F32):
    return jax.ShapeDtypeStruct(dims, dtype)


def conv_macs(module, x):
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return cost.macs(module.apply, variables, x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, name="fc")(nn.gelu(x))


class Net(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        block = nn.remat(Block) if self.remat else Block
        for i in range(2):
            x = block(name=f"block{i}")(x)
        x = x.reshape(x.shape[0], -1, 8)
        x = jnp.einsum("bnc,bmc->bnm", x, x) @ x
        return nn.Dense(5, name="head")(x.mean(1))


NET_MACS = {"stem": 16 * 8 * 9 * 3, "block0/fc": 16 * 64, "block1/fc": 16 * 64, "": 2 * 16 * 16 * 8, "head": 8 * 5}
IMAGE = shape(2, 4, 4, 3)


def test_matrix_products():
    assert cost.macs(jnp.matmul, shape(7, 5), shape(5, 3)) == 7 * 5 * 3
    attention = functools.partial(jnp.einsum, "bqhd,bkhd->bhqk")
    assert cost.macs(attention, shape(2, 6, 3, 4), shape(2, 9, 3, 4)) == 2 * 3 * 6 * 9 * 4
    assert cost.macs(jax.vmap(jnp.dot), shape(4, 5), shape(4, 5)) == 20
    assert cost.macs(lambda x: x * x + jnp.tanh(x), shape(9, 9)) == 0


def test_ragged_product_counts_every_row_once():
    assert cost.macs(jax.lax.ragged_dot, shape(16, 8), shape(3, 8, 5), shape(3, dtype=jnp.int32)) == 16 * 8 * 5


@pytest.mark.parametrize(
    "options, positions",
    [(dict(), 8 * 8), (dict(strides=2), 4 * 4), (dict(padding="VALID"), 6 * 6), (dict(kernel_dilation=2), 8 * 8)],
)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolution(options, positions, groups):
    module = nn.Conv(12, (3, 3), feature_group_count=groups, **options)
    assert conv_macs(module, shape(2, 8, 8, 6)) == 2 * positions * 12 * 9 * 6 // groups


@pytest.mark.parametrize("kernel, stride", [(2, 2), (4, 2), (3, 1)])
def test_transposed_convolution_counts_from_its_input(kernel, stride):
    module = nn.ConvTranspose(12, (kernel, kernel), (stride, stride))
    assert conv_macs(module, shape(2, 8, 8, 6)) == 2 * 64 * 12 * kernel**2 * 6


@pytest.mark.parametrize("groups, kernel, stride", [(1, 3, 1), (3, 3, 1), (1, 2, 2), (3, 2, 2), (1, 3, 2)])
def test_gradient_costs_twice_the_forward_pass(groups, kernel, stride):
    module = nn.Conv(6, (kernel, kernel), stride, feature_group_count=groups)
    x = shape(4, 8, 8, 3)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    loss = lambda v, x: module.apply(v, x).sum()
    assert cost.macs(jax.grad(loss, (0, 1)), variables, x) == 3 * cost.macs(module.apply, variables, x)


def test_loops_branches_and_wrappers():
    w = shape(8, 8)
    assert cost.macs(lambda w: jax.lax.scan(lambda x, _: (x @ w, None), w, length=5)[0], w) == 5 * 512
    assert cost.macs(lambda w: jax.lax.fori_loop(0, 3, lambda _, x: x @ w, w), w) == 3 * 512
    assert cost.macs(lambda w: jax.lax.cond(w.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, w), w) == 2 * 512
    assert cost.macs(jax.jit(jax.checkpoint(lambda w: w @ w)), w) == 512
    assert cost.macs(lambda w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, w @ w), w) == 512
    with pytest.raises(ValueError, match="number of iterations"):
        cost.macs(lambda w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, w), w)


def test_custom_derivatives_count_the_primal_once():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert cost.macs(square, shape(8, 8)) == 512
    assert cost.macs(jax.grad(lambda x: square(x).sum()), shape(8, 8)) == 3 * 512
    smooth = jax.custom_jvp(lambda x: x @ x)
    smooth.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0] @ primals[0]))
    assert cost.macs(smooth, shape(8, 8)) == 512


def test_every_device_and_grid_step_counts():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    product = jax.shard_map(
        jnp.matmul,
        mesh=mesh,
        in_specs=(PartitionSpec("a"), PartitionSpec()),
        out_specs=PartitionSpec("a"),
        axis_names={"a"},
    )
    assert cost.macs(product, shape(16, 8), shape(8, 8)) == 16 * 64

    def kernel(x, out):
        out[...] = x[...] @ x[...]

    tiles = pl.BlockSpec((8, 8), lambda i: (i, 0))
    call = pl.pallas_call(kernel, out_shape=shape(32, 8), grid=(4,), in_specs=[tiles], out_specs=tiles, interpret=True)
    assert cost.macs(call, shape(32, 8)) == 4 * 512


@pytest.mark.parametrize("remat", [False, True])
def test_layers_add_up(remat):
    rows = cost.by_layer(Net(remat), IMAGE)
    assert {row.path: row.macs for row in rows} == {path: 2 * count for path, count in NET_MACS.items()}
    assert {row.path: row.params for row in rows} == {"stem": 224, "block0/fc": 64, "block1/fc": 64, "": 0, "head": 45}
    shallow = cost.by_layer(Net(remat), IMAGE, depth=1)
    assert [row.path for row in shallow] == ["stem", "block0", "block1", "", "head"]
    variables = jax.eval_shape(Net(remat).init, jax.random.key(0), IMAGE)
    assert sum(row.macs for row in shallow) == cost.macs(Net(remat).apply, variables, IMAGE)
    assert sum(row.params for row in shallow) == cost.params_count(variables)


def test_layers_of_a_scanned_stack():
    step = lambda block, x, _: (block(x), None)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return body(Block(name="block"), x, None)[0]

    assert cost.by_layer(Stack(), shape(5, 8)) == [cost.Layer("block/fc", 3 * 64, 3 * 5 * 64)]


def test_arguments_that_are_no_arrays_pass_through():
    class Switch(nn.Module):
        @nn.compact
        def __call__(self, x, twice: bool):
            return nn.Dense(8)(x) @ x if twice else nn.Dense(8)(x)

    x = shape(8, 8)
    variables = jax.eval_shape(lambda: Switch().init(jax.random.key(0), jnp.zeros((8, 8)), True))
    assert cost.macs(Switch().apply, variables, x, twice=True) == 2 * cost.macs(Switch().apply, variables, x, False)
    assert cost.by_layer(Switch(), x, twice=True) == [cost.Layer("Dense_0", 72, 512), cost.Layer("", 0, 512)]


def test_compiled_cost_is_xlas():
    x = shape(64, 64)
    found = cost.compiled_cost(lambda a, b: a @ b, x, x)
    assert found.flops == 2 * 64**3
    assert found.argument_bytes == 2 * found.output_bytes == 2 * 64 * 64 * 4
    assert found.peak_bytes >= 3 * 64 * 64 * 4
    donated = cost.compiled_cost(jax.jit(lambda a: a * 2, donate_argnums=0), x)
    assert donated.peak_bytes == donated.argument_bytes


def published(golden):
    tables = [json.loads(path.read_text()) for path in golden.glob("*/counts.json")]
    return {name: row for table in tables for name, row in table.items()}


def test_vit_as_written_down_has_the_published_count(golden):
    """A plain ViT-S/16 assembled from Flax parts: the count owes nothing to our own backbones."""
    width, tokens, heads = 384, 197, 6

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (nn.Dense(width)(x).reshape(1, tokens, heads, -1) for _ in range(3))
            x = x + nn.Dense(width)(nn.dot_product_attention(q, k, v).reshape(1, tokens, width))
            return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(x)))

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, image):
            x = nn.Conv(width, (16, 16), 16)(image).reshape(1, tokens - 1, width)
            x = jnp.concatenate([x, jnp.zeros((1, 1, width))], 1)
            for _ in range(12):
                x = Layer()(x)
            return nn.Dense(1000)(x[:, 0])

    assert conv_macs(ViT(), shape(1, 224, 224, 3)) == published(golden)["vit_small_patch16_224"]["macs"]


@pytest.mark.parametrize(
    "kind, dtype, flops, bandwidth",
    [
        ("TPU v5 lite", jnp.bfloat16, 197e12, 820e9),
        ("v5e", jnp.int8, 394e12, 820e9),
        ("TPU v5p", jnp.bfloat16, 459e12, 2460e9),
        ("TPU v4", jnp.bfloat16, 275e12, 1230e9),
        ("TPU v6e", F32, 920e12, 1640e9),
        ("NVIDIA H200", jnp.bfloat16, 989e12, 4.8e12),
        ("NVIDIA GH200 480GB", jnp.bfloat16, 989e12, 4e12),
        ("NVIDIA H100 80GB HBM3", jnp.float8_e4m3fn, 1979e12, 3.35e12),
        ("NVIDIA A100-SXM4-80GB", F32, 156e12, 2.039e12),
        ("NVIDIA A100-SXM4-40GB", jnp.bfloat16, 312e12, 1.555e12),
        ("Tesla V100-SXM2-16GB", jnp.float16, 125e12, 900e9),
        ("NVIDIA L4", jnp.bfloat16, 121e12, 300e9),
        ("NVIDIA GeForce RTX 4090", jnp.bfloat16, 165.2e12, 1008e9),
    ],
)
def test_published_peaks(kind, dtype, flops, bandwidth):
    assert cost.peak_flops(kind, dtype) == pytest.approx(flops)
    assert cost.peak_bandwidth(kind) == pytest.approx(bandwidth)


@pytest.mark.parametrize(
    "kind, dtype, problem",
    [
        ("NVIDIA L40", jnp.bfloat16, "L40"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", jnp.bfloat16, "Laptop"),
        ("Tesla V100-SXM2-16GB", jnp.bfloat16, "bfloat16"),
        ("TPU v4", jnp.int8, "int8"),
        ("abacus", jnp.bfloat16, "abacus"),
    ],
)
def test_unknown_peaks_are_errors(kind, dtype, problem):
    with pytest.raises(ValueError, match=problem):
        cost.peak_flops(kind, dtype)


def test_cpu_peak_is_measured_and_shared():
    from research.core import peaks

    total = peaks.measured_flops(jnp.dtype(F32))
    assert 1e9 < total < 1e14
    assert cost.peak_flops(dtype=F32) * jax.local_device_count() == pytest.approx(total)
    assert cost.mfu(total / 2, 1.0, dtype=F32) == pytest.approx(0.5)
    assert 1e8 < cost.peak_bandwidth() * jax.local_device_count() < 1e13
