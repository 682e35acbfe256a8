"""What a step of token reduction does with every token, and what follows from several steps for the first tokens.

Steps themselves are of `research.layers.token_moves`, where the kernels find them too.
"""

import jax
import jax.numpy as jnp

from research.layers.token_moves import Moves, choose, join, lost, merge, ranked, rows, still

__all__ = [
    "Moves",
    "choose",
    "destinations",
    "finite",
    "follow",
    "join",
    "lost",
    "merge",
    "ranked",
    "rows",
    "sizes",
    "source",
    "still",
    "unmerge",
]


def finite(name: str, values: jax.Array) -> jax.Array:
    """`values`, which must be finite numbers where they can be looked at.

    Inside `jit` they cannot: there the order of `ranked` holds, and the loss of such an image is not finite either.

    Raises:
      ValueError: outside of `jit`, some are not.
    """
    if not isinstance(values, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(values))):
        raise ValueError(f"{name} are not all finite: the tokens of this batch hold NaN or infinite numbers")
    return values


def destinations(moves: Moves) -> jax.Array:
    """(B, N): where each token is afterwards, -1 for lost ones."""
    after = jnp.broadcast_to(jnp.arange(moves.keep.shape[1], dtype=jnp.int32)[None], moves.keep.shape)
    before, after = jnp.concatenate([moves.keep, moves.drop], 1), jnp.concatenate([after, moves.into], 1)
    return jax.vmap(lambda before, after: jnp.zeros_like(after).at[before].set(after))(before, after)


def follow(origin: jax.Array, moves: Moves) -> jax.Array:
    """(B, N0) which token held each first one -> (B, N0) which one does after the step; -1 stays -1."""
    return jnp.where(origin < 0, -1, rows(destinations(moves), jnp.maximum(origin, 0)))


def unmerge(x: jax.Array, origin: jax.Array) -> jax.Array:
    """Tokens (B, M, C) back at the places (B, N0) that they came from: copies for merged ones, zeros for lost ones.

    `origin` is that of a network's endpoints, or the `destinations` of one step.
    """
    return jnp.where((origin < 0)[..., None], jnp.zeros((), x.dtype), rows(x, jnp.maximum(origin, 0)))


def sizes(origin: jax.Array, count: int) -> jax.Array:
    """(B, count), integers: how many tokens of the first layer each of the last one holds."""
    return jnp.sum(source(origin, count), axis=2)


def source(origin: jax.Array, count: int) -> jax.Array:
    """The source map (B, count, N0), integers: 1 where a token of the last layer holds one of the first layer."""
    return (origin[:, None, :] == jnp.arange(count, dtype=jnp.int32)[None, :, None]).astype(jnp.int32)
