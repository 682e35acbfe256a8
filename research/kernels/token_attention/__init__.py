"""Attention that also tells what token reduction asks for, without an array of all (B, H, N, N) probabilities.

`reference.py` is the meaning and the form that XLA compiles, `tpu.py` and `gpu.py` the Pallas forms for TPUs and for
Hopper. All give the same numbers but for rounding: on bfloat16 kernels keep scores in float32, XLA's form rounds them
once before.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from research.kernels import dispatch
from research.kernels.token_attention import gpu, reference, tpu
from research.kernels.token_attention.reference import Parts
from research.kernels.token_attention.tpu import Blocks
from research.layers.token_scores import proportional

__all__ = ["FORMS", "Attended", "Blocks", "token_attention"]

FORMS = ("xla", "pallas", "mosaic_gpu", "interpret")
HEADS = "tensor"  # the axis of a mesh that splits heads


class Attended(NamedTuple):
    """What `token_attention` gives.

    Fields:
      out: attention's result (B, H, N, D), in the dtype of the values.
      keys: head-mean keys (B, N, D), which ToMe and PPT compare tokens by.
      row: probabilities of the first query (B, H, N), which EViT ranks by; None without `class_row`.
      weighted: sum over heads of `row`, times the norm of the token's values (B, N), which PPT and ATS rank by; not
        normalised, the class token included; None without `class_row`.

    All but `out` are float32 or better.
    """

    out: jax.Array
    keys: jax.Array
    row: jax.Array | None
    weighted: jax.Array | None


def token_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    size: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    class_row: bool = True,
    form: str | None = None,
    blocks: Blocks | gpu.Blocks | None = None,
    mesh: Mesh | None = None,
) -> Attended:
    """`softmax(q k^T / sqrt(D) + bias + log size) v`, and what token reduction reads off it.

    Args:
      q, k, v: (B, H, N, D).
      size: how many tokens each key stands for (B, N); all one by default. Bolya et al. 2023 (ToMe), equation 1.
      bias: of scores, with trailing axes (H, N, N) of which any may be 1.
      class_row: whether the first query's row is wanted, and what follows from it.
      form: "xla" everywhere; "pallas", which is a kernel where the program is lowered for TPUs and XLA's form on all
        other platforms; "interpret", that kernel on any platform, slowly, for tests; "mosaic_gpu", as "pallas" for
        GPUs, which have to be Hopper's. By default "pallas" where there is a `mesh` and the kernel takes the operands,
        and "xla" otherwise: a kernel in a program that JAX partitions by itself does not compile. No kernel has been
        timed on hardware; what the choice rests on is in the README of `research/kernels`.
      blocks: the kernel's sizes in place of those of `tpu.BLOCKS`, or of `gpu.BLOCKS` with "mosaic_gpu".
      mesh: runs through `shard_map` on it, also where it has one device: images split by `data` and `fsdp`, heads by
        `tensor`.

    Gradients are those of XLA's form, which its backward pass computes anew from q, k, v: a kernel saves memory in the
    forward pass alone.

    Raises:
      ValueError: shapes that do not fit, an unknown form; operands that a kernel asked for does not take: a bias that
        depends on the query or head; for "pallas" other dtypes than float32 and bfloat16, more tokens than VMEM holds;
        for "mosaic_gpu" other dtypes than bfloat16 and float16, heads of other than 16, 32, ... 128 channels.
    """
    _check(q, k, v, size, form)
    form = "xla" if form is None and mesh is None else form
    bias = proportional(None if bias is None else bias.reshape(*[1] * (4 - bias.ndim), *bias.shape), size)
    call = functools.partial(_parts, row=class_row, form=form, blocks=blocks)
    parts = call(q, k, v, bias) if mesh is None else _sharded(call, mesh, q, k, v, bias, class_row)
    if not class_row:
        return Attended(parts.out, parts.keys, None, None)
    return Attended(parts.out, parts.keys, parts.row, jnp.sum(parts.row, axis=1) * jnp.sqrt(parts.squares))


def _check(q, k, v, size, form: str | None):
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: all must be of one shape (B, heads, N, D)")
    if size is not None and size.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"size {size.shape}: {q.shape[0]} images of {q.shape[2]} tokens need {(q.shape[0], q.shape[2])}"
        )
    if form is not None and form not in FORMS:
        raise ValueError(f"form: {form!r} is none of {', '.join(FORMS)}")


def _parts(q, k, v, bias, *, row: bool, form: str | None, blocks: Blocks | gpu.Blocks | None) -> Parts:
    chip = gpu if form == "mosaic_gpu" else tpu
    blocks = dispatch.sizes(chip.BLOCKS, chip.Blocks()) if blocks is None else blocks
    reason = None if form == "xla" else chip.refusal(q, k, v, bias, blocks)
    if form == "xla" or (form is None and reason):
        return reference.token_attention(q, k, v, bias, row)
    if reason:
        raise ValueError(f'the kernel cannot run: {reason}; take form="xla"')
    return _kernel(q, k, v, bias, row, form or "pallas", blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _kernel(q, k, v, bias, row: bool, form: str, blocks: Blocks | gpu.Blocks) -> Parts:
    if form == "interpret":
        return tpu.token_attention(q, k, v, bias, row, blocks, interpret=True)
    platform, chip = ("cuda", gpu) if form == "mosaic_gpu" else ("tpu", tpu)
    kernel = functools.partial(chip.token_attention, row=row, blocks=blocks)
    return jax.lax.platform_dependent(
        q, k, v, bias, **{platform: kernel}, default=functools.partial(reference.token_attention, row=row)
    )


def _forward(q, k, v, bias, row: bool, form: str, blocks: Blocks | gpu.Blocks):
    return _kernel(q, k, v, bias, row, form, blocks), (q, k, v, bias)


def _backward(row: bool, form: str, blocks: Blocks | gpu.Blocks, operands, cotangents):
    return jax.vjp(functools.partial(reference.token_attention, row=row), *operands)[1](cotangents)


_kernel.defvjp(_forward, _backward)


def _sharded(call, mesh: Mesh, q, k, v, bias, row: bool) -> Parts:
    """`call` on every device's own images and heads; what runs over all heads is joined."""

    def local(q, k, v, bias):
        parts = call(q, k, v, bias)
        parts = parts._replace(keys=jax.lax.pmean(parts.keys, HEADS))
        return parts if parts.squares is None else parts._replace(squares=jax.lax.psum(parts.squares, HEADS))

    split, images = PartitionSpec(dispatch.IMAGES, HEADS), PartitionSpec(dispatch.IMAGES)
    out_specs = Parts(split, images, *((split, images) if row else (None, None)))
    biased = None
    if bias is not None:
        biased = PartitionSpec(
            *(axis if size > 1 else None for axis, size in zip((dispatch.IMAGES, HEADS), bias.shape[:2], strict=True))
        )
    # Kernels say nothing of which axes their results vary over when they are interpreted.
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, split, biased), out_specs=out_specs, check_vma=False
    )
    return mapped(q, k, v, bias)
