"""What attention tells of its tokens: how much the class token looks at each, and what their keys look like."""

import jax
import jax.numpy as jnp

from research.layers.attention import class_row
from research.layers.norm import accumulation_dtype


def proportional(bias: jax.Array | None, size: jax.Array | None) -> jax.Array | None:
    """The bias of attention plus log(size) of each key, so that a token counts as often as it has parts.

    Args:
      bias: with trailing axes (heads, M, N), or none.
      size: (B, N), or none to add nothing.
    Source: Bolya et al. 2023 (ToMe), equation 1.
    """
    if size is None:
        return bias
    keys = jnp.log(size)[:, None, None, :]
    return keys if bias is None else keys + bias.astype(keys.dtype).reshape(*[1] * (4 - bias.ndim), *bias.shape)


def head_mean(k: jax.Array) -> jax.Array:
    """Keys (B, H, N, D) -> their mean over the heads (B, N, D), float32 or better: what ToMe compares tokens by."""
    return jnp.mean(k.astype(accumulation_dtype(k)), axis=1)


def significance(q, k, v, bias=None, scale=None) -> jax.Array:
    """(B, N - 1): the class token's attention to the others, summed over heads, times the norms of their values.

    Normalised to a sum of 1 over the tokens; float32 or better. Arguments are those of `attend`; the class token is at
    0. Source: Fayyaz et al. 2022 (ATS, arXiv 2111.15667), equation 6, as PPT takes it too.
    """
    row = jnp.sum(class_row(q, k, bias, scale), axis=1)
    return shares(row * jnp.sqrt(jnp.sum(jnp.square(v.astype(row.dtype)), axis=(1, 3))))


def shares(weighted: jax.Array) -> jax.Array:
    """Scores of all tokens (B, N) -> those of all but the class token (B, N - 1), normalised to a sum of 1."""
    scores = weighted[:, 1:]
    return scores / jnp.sum(scores, axis=1, keepdims=True)
