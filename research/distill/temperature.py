"""A temperature that is learned against the student, and its schedule: CTKD. Li et al. 2023, "Curriculum Temperature".

The temperature is low + span sigmoid(theta) with a trained scalar theta. Its gradient is multiplied by a strength that
goes from 0 to -1 in the first epochs: once negative, theta *raises* the loss that the student lowers.
"""

import jax
import jax.numpy as jnp

from research.distill.logits import kd
from research.distill.numerics import scale_gradient, wide

THETA = 1.0  # where theta starts: T = 15.62


def strength(
    epoch: jax.Array | float,
    *,
    epochs: float = 10,
    start: float = 0.0,
    end: float = -1.0,
    shape: str = "cosine",
) -> jax.Array:
    """The factor of theta's gradient in an epoch, counted from 1; ImageNet runs take epochs = 5.

    "cosine" goes from start to end in `epochs` and stays; "linear", as in the official code, stops one step short
    of the end, at 0.9 of the way for 10 epochs.

    Raises:
      ValueError: another shape.
    """
    epoch = jnp.maximum(jnp.asarray(epoch, jnp.result_type(float)), 0)
    if shape == "cosine":
        way = (1 - jnp.cos(jnp.pi * jnp.minimum(epoch, epochs) / epochs)) / 2
    elif shape == "linear":
        way = jnp.minimum(epoch, epochs - 1) / epochs
    else:
        raise ValueError(f"shape={shape!r}: choose 'cosine' or 'linear'")
    return start + (end - start) * way


def temperature(theta: jax.Array, *, low: float = 1.0, span: float = 20.0) -> jax.Array:
    """low + span sigmoid(theta), of theta's shape."""
    return low + span * jax.nn.sigmoid(theta)


def ctkd(
    student: jax.Array,
    teacher: jax.Array,
    theta: jax.Array,
    *,
    strength: jax.Array | float = -1.0,
    low: float = 1.0,
    span: float = 20.0,
) -> jax.Array:
    """T^2 KL at the learned temperature, (B,); T^2 is differentiated too.

    Args:
      theta: () trained scalar, starting at `THETA`, by the student's optimiser with its weight decay. The published
        runs weigh the loss by 0.9 beside 0.1 cross-entropy.
      strength: factor of theta's gradient, see the function of that name.
    """
    student, teacher, theta = wide(student, teacher, theta)
    factor = jnp.asarray(strength).astype(theta.dtype)
    return kd(student, teacher, temperature=temperature(scale_gradient(theta, factor), low=low, span=span))
