"""The meaning of `token_attention`, in jnp: attention as everywhere, and what token reduction reads off it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.layers.attention import attend, class_row
from research.layers.norm import accumulation_dtype
from research.layers.token_scores import head_mean


class Parts(NamedTuple):
    """What one pass over queries, keys and values gives.

    Fields:
      out: (B, H, N, D), in the dtype of the values.
      keys: head-mean keys (B, N, D).
      row: the first query's probabilities (B, H, N), or None.
      squares: of each token, the sum of its values' squares over all heads (B, N), or None.

    All but `out` are float32 or better.
    """

    out: jax.Array
    keys: jax.Array
    row: jax.Array | None = None
    squares: jax.Array | None = None


def bias_refusal(bias: jax.Array | None) -> str | None:
    """Why no kernel takes a bias; None where it can."""
    if bias is not None and bias.shape[1:3] != (1, 1):
        return f"it takes a bias of keys alone, (B or 1, 1, 1, N), not {bias.shape}"
    return None


def token_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, row: bool) -> Parts:
    """Queries, keys, values (B, H, N, D) and a bias that `attend` takes; `row` asks for the last two parts."""
    parts = Parts(attend(q, k, v, bias), head_mean(k))
    if not row:
        return parts
    squares = jnp.sum(jnp.square(v.astype(accumulation_dtype(v))), axis=(1, 3))
    return parts._replace(row=class_row(q, k, bias), squares=squares)
