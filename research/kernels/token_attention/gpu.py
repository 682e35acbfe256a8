"""`token_attention` for NVIDIA Hopper (sm_90, Mosaic GPU): a program for 64 queries of a head, keys in a stream.

A warpgroup holds its queries in shared memory and takes keys and values a block at a time, with the running maximum and
sum of Dao et al. 2022 (FlashAttention, arXiv 2205.14135, section 3.1); blocks ahead are fetched meanwhile. N is padded
to whole blocks by XLA, which also transposes the keys; keys of padding are hidden by their bias. The class row leaves
the kernel as scores (B, H, N), from the programs that hold the first query, and XLA takes its softmax. Head-mean keys
and squares of values are XLA's too: a sweep over k and v that holds nothing of size N x N.

Not timed on hardware.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from research.kernels.token_attention.reference import Parts, bias_refusal
from research.layers.token_scores import head_mean

DTYPES = (jnp.bfloat16, jnp.float16)  # of float32 the tensor cores would see 10 bits
QUERIES = 64  # rows of a warpgroup's product
SHARED = 227 * 1024  # bytes of shared memory that a program may take, sm_90
LOWEST = -1e30  # the least bias: finite, so that a block of hidden keys alone gives numbers


class Blocks(NamedTuple):
    """Sizes of a program.

    Fields:
      keys: keys and values of one step; a multiple of 64, at most 256.
      stages: blocks of keys and values in shared memory at a time.
    """

    keys: int = 64
    stages: int = 2


# By `device_kind`, see `dispatch.sizes`; none has been tuned on hardware.
BLOCKS: dict[str, Blocks] = {}


def shared_bytes(dim: int, blocks: Blocks) -> int:
    """Bytes of shared memory of one program for heads of `dim` channels, but for barriers."""
    half = QUERIES * (dim + blocks.keys) + 2 * blocks.stages * blocks.keys * dim
    return 2 * half + 4 * blocks.keys * (blocks.stages + QUERIES)


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, blocks: Blocks) -> str | None:
    """Why the kernel cannot take these operands; None where it can."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"it takes bfloat16 or float16 throughout, not q {q.dtype}, k {k.dtype}, v {v.dtype}"
    if reason := bias_refusal(bias):
        return reason
    if (dim := q.shape[-1]) % 16 or not 0 < dim <= 128:
        return f"it takes heads of 16, 32, ... 128 channels, not {dim}"
    if blocks.keys % 64 or not 0 < blocks.keys <= 256 or blocks.stages < 1:
        return f"{blocks}: it takes 64, 128, 192 or 256 keys, and a stage or more"
    if (needed := shared_bytes(dim, blocks)) > SHARED:
        return f"{blocks} with {dim} channels need {needed} bytes of shared memory of {SHARED}"
    return None


def token_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    row: bool,
    blocks: Blocks,
    interpret: Any = None,
) -> Parts:
    """As `reference.token_attention`, of operands without `refusal`; scores are kept in float32 here.

    Args:
      interpret: parameters of Mosaic GPU's interpreter, on any platform, slowly, for tests.
    """
    batch, heads, tokens, dim = q.shape
    parts, steps = pl.cdiv(tokens, QUERIES), pl.cdiv(tokens, blocks.keys)
    keys = _split(k, steps, blocks.keys).swapaxes(-1, -2)
    operands = (_split(q, parts, QUERIES), keys, _split(v, steps, blocks.keys), _biases(bias, q, steps, blocks.keys))
    out_type = [jax.ShapeDtypeStruct(operands[0].shape, v.dtype)]
    if row:
        out_type.append(jax.ShapeDtypeStruct((batch, heads, steps, blocks.keys), jnp.float32))
    stages = min(blocks.stages, steps)
    out, *scores = plgpu.kernel(
        functools.partial(_kernel, steps=steps, cast=_keep if interpret else plgpu.layout_cast),
        out_type=out_type,
        grid=(parts, heads, batch),
        grid_names=("part", "head", "image"),
        scratch_types={"scratch": _scratch(dim, blocks._replace(stages=stages), q.dtype, row)},
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="token_attention",
    )(*operands)
    out = out.reshape(batch, heads, -1, dim)[:, :, :tokens]
    if not row:
        return Parts(out, head_mean(k))
    scores = scores[0].reshape(batch, heads, -1)[..., :tokens]
    squares = jnp.sum(jnp.square(v.astype(jnp.float32)), axis=(1, 3))
    return Parts(out, head_mean(k), jax.nn.softmax(scores, axis=-1), squares)


def _split(x: jax.Array, blocks: int, size: int) -> jax.Array:
    """(B, H, N, D) with N in whole blocks: (B, H, blocks, size, D)."""
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, blocks * size - x.shape[2]), (0, 0)))
    return padded.reshape(*x.shape[:2], blocks, size, x.shape[3])


def _biases(bias: jax.Array | None, q: jax.Array, steps: int, size: int) -> jax.Array:
    """The bias of each key (B, steps, size); keys of padding are hidden."""
    batch, _, tokens, _ = q.shape
    given = jnp.zeros((1, 1), jnp.float32) if bias is None else bias[:, 0, 0].astype(jnp.float32)
    given = jnp.broadcast_to(jnp.maximum(given, LOWEST), (batch, tokens))
    hidden = ((0, 0), (0, steps * size - tokens))
    return jnp.pad(given, hidden, constant_values=LOWEST).reshape(batch, steps, size)


def _scratch(dim: int, blocks: Blocks, dtype, row: bool) -> list:
    """Queries (later the result), keys, values, biases, weights, scores or None; barriers of queries and of stages."""
    width = math.gcd(dim, 64)  # the operands of a product must be laid out alike
    layout = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    half = lambda *shape: plgpu.SMEM(shape, dtype, transforms=layout)
    return [
        half(QUERIES, dim),
        half(blocks.stages, dim, blocks.keys),
        half(blocks.stages, blocks.keys, dim),
        plgpu.SMEM((blocks.stages, blocks.keys), jnp.float32),
        half(QUERIES, blocks.keys),
        plgpu.SMEM((QUERIES, blocks.keys), jnp.float32) if row else None,
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=3, num_barriers=blocks.stages),
    ]


def _kernel(q, k, v, bias, out, *row, scratch, steps: int, cast):
    """Queries q[image, head, part] against k and v [image, head, step], all steps; `cast` names registers' layout."""
    queries, keys, values, biases, weights, scores, held, ready = scratch
    dim, stages = queries.shape[1], biases.shape[0]
    part, head, image = (lax.axis_index(name) for name in ("part", "head", "image"))
    layout = plgpu.Layout.WGMMA
    down = lambda x, shape: lax.broadcast_in_dim(x, shape, (0,))

    def fetch(step, stage):
        plgpu.copy_gmem_to_smem(k.at[image, head, step], keys.at[stage], ready.at[stage])
        plgpu.copy_gmem_to_smem(v.at[image, head, step], values.at[stage], ready.at[stage])
        plgpu.copy_gmem_to_smem(bias.at[image, step], biases.at[stage], ready.at[stage])

    def take(step, carried):
        total, top, mass = carried
        stage = lax.rem(step, jnp.asarray(stages, step.dtype))
        plgpu.barrier_wait(ready.at[stage])
        score = _product(queries, keys.at[stage]) * dim**-0.5
        score += lax.broadcast_in_dim(cast(biases[stage], layout.reduce(0)), score.shape, (1,))
        if row:
            pl.when(part == 0)(lambda: _store_row(score, scores, row[0].at[image, head, step]))
        higher = jnp.maximum(top, jnp.max(score, axis=1))
        weight = jnp.exp(score - down(higher, score.shape))
        weights[...] = weight.astype(weights.dtype)
        plgpu.commit_smem()
        added = _product(weights, values.at[stage])
        # Both products are done here, and nothing reads the stage any more.
        pl.when(step + stages < steps)(lambda: fetch(step + stages, stage))
        fade = jnp.exp(top - higher)
        return total * down(fade, total.shape) + added, higher, mass * fade + jnp.sum(weight, axis=1)

    plgpu.copy_gmem_to_smem(q.at[image, head, part], queries, held)
    for stage in range(stages):
        fetch(stage, stage)
    plgpu.barrier_wait(held)
    rows = lambda value: cast(jnp.full((QUERIES,), value, jnp.float32), layout.reduce(1))
    none = cast(jnp.zeros((QUERIES, dim), jnp.float32), layout)
    total, _, mass = lax.fori_loop(0, steps, take, (none, rows(-jnp.inf), rows(0.0)))
    queries[...] = (total / down(mass, total.shape)).astype(queries.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(queries, out.at[image, head, part])
    plgpu.wait_smem_to_gmem(0)


def _product(a, b) -> jax.Array:
    """a (M, K) times b (K, N), both in shared memory, in float32 registers."""

    def multiply(sums):
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _store_row(score: jax.Array, scores, row):
    """The first of `score`'s rows, by way of shared memory: a warpgroup cannot pick a row of its registers."""
    scores[...] = score
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scores.at[0], row)
    plgpu.wait_smem_to_gmem(0)


def _keep(x: jax.Array, layout) -> jax.Array:
    """The interpreter of JAX 0.10 knows no layouts, which change no number."""
    return x
