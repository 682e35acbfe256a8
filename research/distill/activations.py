"""Distillation of activations and what decides them: AB's boundaries, OFD's margins, VID's likelihood.

Maps are (B, H, W, C), the teacher's constants. Losses of one stage give (B,) values.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.distill.features import TORCH_INIT, adaptive_pool
from research.distill.maps import same_size
from research.distill.numerics import wide
from research.layers.norm import BatchNorm

# He initialisation over the outputs, as mdistiller's connectors have.
HE_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Connector(nn.Module):
    """1x1 convolution without bias and batch norm, to `features` channels; ReLU if asked. Of OFD and SRRL."""

    features: int
    relu: bool = False
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Conv(self.features, (1, 1), use_bias=False, kernel_init=HE_OUT, dtype=self.dtype, name="conv")(x)
        x = BatchNorm(group=self.group, dtype=self.dtype, name="bn")(x, train)
        return nn.relu(x) if self.relu else x


def ab(student: jax.Array, teacher: jax.Array, *, margin: float | jax.Array = 1.0) -> jax.Array:
    """Squared distance to the margin where a neuron is on the wrong side, summed, (B,). Heo et al. 2019.

    Maps before ReLU, the student's of the teacher's shape. RepDistiller multiplies by 3 / 1000 and by 2^(i - n + 1) for
    stage i of n, and trains with it alone in a first stage.
    """
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    off = jnp.where((student > -margin) & (teacher <= 0), jnp.square(student + margin), 0)
    on = jnp.where((student <= margin) & (teacher > 0), jnp.square(student - margin), 0)
    return jnp.sum(off + on, axis=tuple(range(1, student.ndim)))


def margins(scale: jax.Array, bias: jax.Array) -> jax.Array:
    """E[x | x < 0] of x ~ N(bias, scale^2), per channel: what a batch norm's output is where ReLU cuts it off.

    -3 scale where less than 0.1 % is cut off. Heo et al. 2019 (OFD), from the last batch norm before the map.
    """
    scale, bias = wide(jnp.abs(scale), bias)
    spread = scale > 0
    ratio = bias / jnp.where(spread, scale, 1)
    share = jax.scipy.stats.norm.cdf(-ratio)
    cut = share > 0.001
    mean = bias - scale * jax.scipy.stats.norm.pdf(ratio) / jnp.where(cut, share, 1)
    return jnp.where(spread, jnp.where(cut, mean, -3 * scale), jnp.minimum(bias, 0))


def ofd(student: jax.Array, teacher: jax.Array, margin: jax.Array) -> jax.Array:
    """Partial squared distance to max(teacher, margin), summed over the map, (B,). Heo et al. 2019 (OFD).

    Where the teacher is not positive only a student above it pays. Maps before ReLU, the teacher's pooled to the
    student's size, which a `Connector` brings to its width. mdistiller halves the weight with every earlier stage and
    weighs the sum by 0.001.

    Args:
      margin: (C,) of `margins`.
    """
    student, teacher, margin = wide(student, jax.lax.stop_gradient(teacher), margin)
    if teacher.shape[1:3] != student.shape[1:3]:
        teacher = adaptive_pool(teacher, student.shape[1:3])
    margin = jnp.broadcast_to(margin, teacher.shape[-1:])[None, None, None, :]
    target = jnp.maximum(teacher, margin)
    pays = (teacher > 0) | (student > target)
    return jnp.sum(jnp.where(pays, jnp.square(student - target), 0), axis=(1, 2, 3))


class Likelihood(nn.Module):
    """VID's Gaussian of the teacher's map given the student's: three 1x1 convolutions for the mean, a scale a channel.

    Called with the student's map (B, h, w, c); returns the mean (B, h, w, C) and the variance (C,),
    softplus(log_scale) + eps, which starts at `variance`. mdistiller, unlike RepDistiller, does not train it.
    """

    features: int
    variance: float = 5.0
    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        for index in range(3):
            conv = nn.Conv(
                self.features, (1, 1), use_bias=False, kernel_init=TORCH_INIT, dtype=self.dtype, name=f"conv{index}"
            )
            x = conv(nn.relu(x) if index else x)
        start = nn.initializers.constant(jnp.log(jnp.expm1(self.variance - self.eps)))
        log_scale = self.param("log_scale", start, (self.features,))
        return x, jax.nn.softplus(log_scale) + self.eps


def vid(mean: jax.Array, variance: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean of ((mean - t)^2 / variance + log variance) / 2, (B,), without log 2 pi. Ahn et al. 2019.

    `mean` (B, h, w, C) and `variance` (C,) of a `Likelihood` whose input had the smaller of the two sizes; summed over
    the stages with weight 1.
    """
    mean, teacher, variance = *same_size(mean, teacher), *wide(variance)
    variance = variance[None, None, None, :]
    return jnp.mean((jnp.square(mean - teacher) / variance + jnp.log(variance)) / 2, axis=(1, 2, 3))
