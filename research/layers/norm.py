"""Normalisation layers whose statistics are taken in float32 or better and whose batch has a stated scope."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import scope


def accumulation_dtype(x: jax.Array):
    """The dtype sums over `x` are taken in: float32, or float64 for float64 arrays."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, (..., C) -> (..., C); parameters `scale` and `bias` (C,).

    Differs from `nn.LayerNorm` in that the variance is a mean of squared deviations, as PyTorch takes it, and that
    bfloat16 inputs meet the float32 statistics by an explicit cast. Source: Ba et al. 2016.
    """

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", self.scale_init, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(accumulation_dtype(x))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return _affine(x, scale, bias).astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018): (B, ..., C) -> (B, ..., C), over all positions and C / `groups` channels.

    Parameters `scale` and `bias` (C,).

    Raises:
      ValueError: the channels do not divide into groups.
    """

    groups: int = 32
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(f"{channels} channels do not divide into {self.groups} groups")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        grouped = x.astype(accumulation_dtype(x)).reshape(*x.shape[:-1], self.groups, -1)
        axes = (*range(1, x.ndim - 1), x.ndim)
        grouped = grouped - jnp.mean(grouped, axis=axes, keepdims=True)
        variance = jnp.mean(jnp.square(grouped), axis=axes, keepdims=True)
        return _affine((grouped * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape), scale, bias).astype(
            self.dtype
        )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's meaning of the running statistics.

    Normalises with the biased variance; `var` in `batch_stats` is updated with the unbiased one (Ioffe & Szegedy 2015).

    Fields:
      momentum: weight of the old running statistics (PyTorch's momentum 0.1 is 0.9 here).
      group: examples whose statistics are taken together. None is the global batch, also where the batch is split over
        a mapped axis (`research.core.scope`); N is groups of N consecutive examples of the global batch, on any number
        of devices, and the running statistics follow the mean over the groups' statistics.
    Raises:
      ValueError: the batch does not divide into groups.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    group: int | None = None
    dtype: jnp.dtype = jnp.float32
    scale_init: Callable = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)

        x = x.astype(accumulation_dtype(x))
        if not train:
            x = _affine_stats(x, mean.value, var.value, self.epsilon)
            return _affine(x, scale, bias).astype(self.dtype)

        batch_mean, batch_var, count = _statistics(x, jax.lax.stop_gradient(mean.value), self.group)
        if not self.is_initializing():
            unbiased = batch_var * (count / max(count - 1, 1))
            for running, new in ((mean, batch_mean), (var, unbiased)):
                new = scope.mean(jnp.mean(new, axis=0)).astype(running.value.dtype)
                running.value = self.momentum * running.value + (1 - self.momentum) * new
        grouped = x.reshape(batch_mean.shape[0], -1, *x.shape[1:])
        spread = (-1, *[1] * x.ndim)[: x.ndim] + shape
        grouped = _affine_stats(grouped, batch_mean.reshape(spread), batch_var.reshape(spread), self.epsilon)
        return _affine(grouped.reshape(x.shape), scale, bias).astype(self.dtype)


class GRN(nn.Module):
    """Global response normalisation: (B, H, W, C) -> (B, H, W, C), `x + scale * x * n + bias`.

    `n` is each channel's L2 norm over the map divided by the mean of the norms. Source: ConvNeXt V2, Woo et al. 2023,
    equations 1-3.
    """

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(accumulation_dtype(x))
        square = jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)
        # A channel that is zero everywhere has norm 0 and, as in PyTorch, gradient 0 instead of 0/0.
        norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        response = norm / (jnp.mean(norm, axis=-1, keepdims=True) + self.epsilon)
        return (x + _affine(x * response, scale, bias)).astype(self.dtype)


def _broadcast(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.astype(x.dtype).reshape(*[1] * (x.ndim - vector.ndim), *vector.shape)


def _affine(x, scale, bias):
    return x * _broadcast(scale, x) + _broadcast(bias, x)


def _affine_stats(x, mean, var, epsilon):
    return (x - _broadcast(mean, x)) * jax.lax.rsqrt(_broadcast(var, x) + epsilon)


def _statistics(x: jax.Array, shift: jax.Array, group: int | None) -> tuple[jax.Array, jax.Array, int]:
    """Mean and biased variance (G, C) of the groups at hand, and the number of values each is taken over.

    Both come from one pass over `x`: moments around `shift`, the running mean, so that a mean far from zero does not
    cancel the digits of the variance.
    """
    batch, positions = x.shape[0], x[0, ..., 0].size
    shares = 1 if scope.axis() is None else jax.lax.axis_size(scope.axis())
    size = group or batch * shares
    groups, neighbours = max(batch // size, 1), max(size // batch, 1)
    if groups * size != batch * neighbours or shares % neighbours:
        raise ValueError(
            f"a batch of {batch * shares} examples on {shares} mapped devices does not divide into batch-norm groups "
            f"of {size}: change `bn_group` or `batch_size`"
        )
    deviation = (x - _broadcast(shift, x)).reshape(groups, -1, x.shape[-1])
    first, second = jnp.mean(deviation, axis=1), jnp.mean(jnp.square(deviation), axis=1)
    if neighbours == shares:
        first, second = scope.mean((first, second))
    elif neighbours > 1:
        first, second = (_mean_over_neighbours(moment, neighbours) for moment in (first, second))
    variance = jnp.maximum(second - jnp.square(first), 0)
    return first + _broadcast(shift, first), variance, size * positions


def _mean_over_neighbours(moment: jax.Array, count: int) -> jax.Array:
    """Mean of (1, C) over the aligned run of `count` mapped devices that this one belongs to."""
    everyone = scope.gather(moment).reshape(-1, count, moment.shape[-1])
    return jax.lax.dynamic_slice_in_dim(jnp.mean(everyone, axis=1), jax.lax.axis_index(scope.axis()) // count, 1)
