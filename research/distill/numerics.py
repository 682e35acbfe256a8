"""Arithmetic the losses share: wide accumulation, norms whose gradient exists at zero, sums in which zero wins."""

import jax
import jax.numpy as jnp


def wide(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays in float32, or all in float64 where one of them is: the dtype every loss is computed in."""
    dtype = jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32
    return [x.astype(dtype) for x in arrays]


def expected(weight: jax.Array, value: jax.Array) -> jax.Array:
    """`sum(weight * value)` over the last axis, in which a weight of zero silences even an infinite value."""
    used = weight > 0
    return jnp.sum(jnp.where(used, weight * jnp.where(used, value, 0), 0), axis=-1)


def norm(x: jax.Array, axis: int | None = -1, keepdims: bool = False) -> jax.Array:
    """Euclidean norm over `axis` (None: over all axes); its gradient at a zero vector is zero, as PyTorch has it."""
    square = jnp.sum(jnp.square(x), axis=axis, keepdims=keepdims)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def unit(x: jax.Array, eps: float = 0.0) -> jax.Array:
    """`x` over its norm along the last axis; vectors no longer than `eps` become zero, with zero gradient."""
    length = norm(x, keepdims=True)
    long = length > eps
    return jnp.where(long, x / jnp.where(long, length, 1), 0)


def gram(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner products (..., n, m) of the rows of a (..., n, d) and b (..., m, d), at full precision on any device.

    Losses compare Gram matrices that hardly differ; the bfloat16 passes that accelerators default to would swamp that.
    """
    return jnp.einsum("...nd,...md->...nm", a, b, precision=jax.lax.Precision.HIGHEST)


def scale_gradient(x: jax.Array, factor: jax.Array | float) -> jax.Array:
    """`x`, whose gradient is multiplied by `factor`; a negative factor reverses it (Ganin & Lempitsky 2015)."""
    fixed = jax.lax.stop_gradient(x)
    return fixed + factor * (x - fixed)


def until(epoch: jax.Array | float, epochs: float | None) -> jax.Array:
    """1 in the first `epochs` epochs, counted from 0, and 0 afterwards: a stage that initialises; None is always 1."""
    return jnp.ones(()) if epochs is None else (jnp.asarray(epoch) < epochs).astype(jnp.float32)


def warmup(epoch: jax.Array | float, epochs: float) -> jax.Array:
    """The factor min(epoch / epochs, 1) of DKD and ReviewKD; 1 where `epochs` is 0.

    mdistiller counts epochs from 1; loops that count from 0, as vanillaKD's, have a factor of 0 in their first epoch.
    """
    return jnp.minimum(jnp.asarray(epoch, float) / epochs, 1.0) if epochs else jnp.ones(())


def at_least_two(loss: str, rows: int) -> None:
    """Raises a ValueError where a loss that compares examples is given fewer than two."""
    if rows < 2:
        raise ValueError(f"{loss} relates the examples of a batch to each other: it needs two or more, not {rows}")
