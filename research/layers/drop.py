"""Dropout and stochastic depth, whose draws are the same however the batch is split."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import scope


def rates(maximum: float, depth: int) -> tuple[float, ...]:
    """Drop-path rates of `depth` blocks, growing linearly from 0 to `maximum` (Huang et al. 2016, section 3)."""
    return tuple(maximum * i / max(depth - 1, 1) for i in range(depth))


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Booleans of a shape whose first axis is the batch, true with probability 1 - rate.

    Under a mapped batch axis the draw is made for the global batch and cut to the own share, so a key gives the same
    masks on one device and on many.
    """
    shares = 1 if scope.axis() is None else jax.lax.axis_size(scope.axis())
    return scope.local(jax.random.bernoulli(key, 1.0 - rate, (shape[0] * shares, *shape[1:])))


class Dropout(nn.Module):
    """Zeroes single entries of (B, ...), scaled to keep the expectation; rng stream `dropout`. Srivastava et al. 2014.

    Differs from `nn.Dropout` in that replicas under `pmap` draw what one device would have drawn.
    """

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return _dropped(self, "dropout", x, x.shape, train)


class DropPath(nn.Module):
    """Zeroes a whole residual branch for a random part of the examples, scaled to keep the expectation.

    Input and output (B, ...). The rng stream is `dropout`. Source: Huang et al. 2016, "Deep Networks with Stochastic
    Depth"; per example and scaled while training, as timm's `DropPath`.
    """

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return _dropped(self, "drop-path", x, (x.shape[0], *[1] * (x.ndim - 1)), train)


def _dropped(module: nn.Module, name: str, x: jax.Array, shape: tuple[int, ...], train: bool) -> jax.Array:
    """x where a mask of `shape` keeps it, scaled; zero elsewhere."""
    rate = module.rate
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"the {name} rate must lie in [0, 1), not {rate}")
    if not train or rate == 0.0:
        return x
    return jnp.where(keep_mask(module.make_rng("dropout"), rate, shape), x / (1.0 - rate), jnp.zeros_like(x))
