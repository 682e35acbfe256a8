"""Stochastic depth."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import scope


def rates(maximum: float, depth: int) -> tuple[float, ...]:
    """Drop-path rates of `depth` blocks, growing linearly from 0 to `maximum` (Huang et al. 2016, section 3)."""
    return tuple(maximum * i / max(depth - 1, 1) for i in range(depth))


def keep_mask(key: jax.Array, rate: float, batch: int) -> jax.Array:
    """(batch,) booleans, true with probability 1 - rate.

    Under a mapped batch axis the draw is made for the global batch and cut to the own share, so a key gives the same
    masks on one device and on many.
    """
    shares = 1 if scope.axis() is None else jax.lax.axis_size(scope.axis())
    return scope.local(jax.random.bernoulli(key, 1.0 - rate, (batch * shares,)))


class DropPath(nn.Module):
    """Zeroes a whole residual branch for a random part of the examples, scaled to keep the expectation.

    Input and output (B, ...). The rng stream is `dropout`. Source: Huang et al. 2016, "Deep Networks with Stochastic
    Depth"; per example and scaled while training, as timm's `DropPath`.
    """

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not 0.0 <= self.rate < 1.0:
            raise ValueError(f"the drop-path rate must lie in [0, 1), not {self.rate}")
        if not train or self.rate == 0.0:
            return x
        keep = keep_mask(self.make_rng("dropout"), self.rate, x.shape[0]).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))
