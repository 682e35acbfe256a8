"""Attention of a network whose tokens become fewer, with what its method reads off it."""

import jax

from research.core import sharding
from research.kernels.token_attention import Attended, token_attention


def attended(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    size: jax.Array | None,
    bias: jax.Array | None,
    scale: jax.Array | None,
    class_row: bool,
) -> Attended:
    """`research.kernels.token_attention` on the mesh of the program, where its heads can be split over it.

    Args:
      scale: of the scores in place of 1 / sqrt(D), with trailing axes (heads, 1, 1); the queries take it on.
    """
    if scale is not None:
        scale = scale.reshape(*[1] * (4 - scale.ndim), *scale.shape) * q.shape[-1] ** 0.5
        q = (q.astype(scale.dtype) * scale).astype(q.dtype)
    mesh = sharding.around(q.shape[0])
    if mesh is not None and q.shape[1] % mesh.shape["tensor"]:
        mesh = None
    return token_attention(q, k, v, size, bias, class_row=class_row, mesh=mesh)
