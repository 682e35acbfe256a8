"""How far outputs of quantised blocks are from what they should be."""

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype


def squares(target: jax.Array, output: jax.Array) -> jax.Array:
    """Mean squared difference of two arrays, in float32 or better."""
    wide = accumulation_dtype(output)
    return jnp.mean(jnp.square(target.astype(wide) - output.astype(wide)))


def divergence(target: jax.Array, output: jax.Array) -> jax.Array:
    """KL(softmax(target) || softmax(output)) over the last axis, averaged over positions, in float32 or better."""
    wide = accumulation_dtype(output)
    wanted, found = (jax.nn.log_softmax(x.astype(wide), axis=-1) for x in (target, output))
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1))


def distance(target: jax.Array, output: jax.Array) -> jax.Array:
    """CBQ's measure E of hidden states (..., C): `squares` plus `divergence` (arXiv 2312.07950)."""
    return squares(target, output) + divergence(target, output)
