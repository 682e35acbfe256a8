"""What the ops on tokens of single images have in common: the choice of a form, the gradient, a mesh."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh, PartitionSpec

FORMS = ("xla", "pallas", "interpret")
IMAGES = ("data", "fsdp")  # the axes of a mesh that split images


class Op(NamedTuple):
    """An op in its parts. All operands and results have the images as their first axis; operands may be None.

    Fields:
      plan: (*operands) -> integers, in which there is no gradient: what goes where.
      apply: (plan, *operands) -> arrays, differentiable in the operands.
      kernel: (*operands, interpret=bool) -> (plan, arrays), both at once, on TPUs.
      refusal: why the kernel cannot take these operands, None where it can.
    """

    plan: Callable[..., Any]
    apply: Callable[..., Any]
    kernel: Callable[..., Any]
    refusal: Callable[..., str | None]


Sizes = TypeVar("Sizes")


def sizes(tuned: Mapping[str, Sizes], default: Sizes) -> Sizes:
    """A kernel's sizes for the kind of device that this process has, the default for kinds that none are known for.

    A program that is compiled ahead of time for devices of another kind gives its ops `blocks`.
    """
    return tuned.get(jax.devices()[0].device_kind, default)


def run(op: Op, operands: tuple, form: str | None, mesh: Mesh | None) -> tuple[Any, Any]:
    """(plan, arrays) of the operands.

    Args:
      form: "xla" everywhere; "pallas", which is the kernel where the program is lowered for TPUs and XLA's form on all
        other platforms; "interpret", the kernel on any platform, slowly, for tests. By default "pallas" where there is
        a mesh and no refusal, and "xla" otherwise: a kernel in a program that JAX partitions by itself does not
        compile. What the choice rests on is in the README of `research/kernels`.
      mesh: maps the op over it, also where it has one device: images split by `data` and `fsdp`.

    Gradients of a kernel are those of `apply` by the plan that the kernel made.

    Raises:
      ValueError: an unknown form, a kernel asked for that cannot take the operands, images that the mesh cannot split.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"form: {form!r} is none of {', '.join(FORMS)}")
    if mesh is None:
        return _local(op, operands, form or "xla")
    images, devices = operands[0].shape[0], mesh.shape["data"] * mesh.shape["fsdp"]
    if images % devices:
        raise ValueError(f"{images} images do not divide by the {devices} devices of the mesh that split them")
    split = PartitionSpec(IMAGES)
    # Kernels say nothing of which axes their results vary over when they are interpreted.
    local = jax.shard_map(
        lambda *own: _local(op, own, form), mesh=mesh, in_specs=split, out_specs=split, check_vma=False
    )
    return local(*operands)


def _local(op: Op, operands: tuple, form: str | None) -> tuple[Any, Any]:
    reason = None if form == "xla" else op.refusal(*operands)
    if form == "xla" or (form is None and reason):
        return _reference(op, *operands)
    if reason:
        raise ValueError(f'the kernel cannot run: {reason}; take form="xla"')
    return _kernel(op, form == "interpret")(*operands)


def _reference(op: Op, *operands) -> tuple[Any, Any]:
    plan = op.plan(*operands)
    return plan, op.apply(plan, *operands)


def _kernel(op: Op, interpret: bool) -> Callable[..., tuple[Any, Any]]:
    """The kernel, which is XLA's form where a program is lowered for others than TPUs, with the gradient of `apply`."""

    @jax.custom_vjp
    def call(*operands):
        if interpret:
            return op.kernel(*operands, interpret=True)
        return jax.lax.platform_dependent(*operands, tpu=op.kernel, default=lambda *operands: _reference(op, *operands))

    def forward(*operands):
        plan, arrays = call(*operands)
        return (plan, arrays), (plan, operands)

    def backward(kept, cotangents):
        plan, operands = kept
        return jax.vjp(lambda *operands: op.apply(plan, *operands), *operands)[1](cotangents[1])

    call.defvjp(forward, backward)
    return call
