"""DynamicViT: small predictors score the patches, and only the best go on; trained through hard random decisions.

Source: Rao et al. 2021 (arXiv 2106.02034), Rao et al. 2022 (arXiv 2207.01580), and the official code
(raoyongming/DynamicViT). In training all tokens stay and attention is masked by a policy, so that gradients reach the
predictors; in evaluation the tokens that are not kept leave the arrays. Losses are in `dynamicvit_losses`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import scope
from research.layers.dense import Dense
from research.layers.mlp import gelu
from research.layers.norm import LayerNorm, accumulation_dtype
from research.layers.reduction import Reduction, Tokens
from research.tokens import policies
from research.tokens.moves import finite, follow, lost, ranked, rows

# Rules between our names of the predictors and the official ones, to be put before those of the network.
NAMES = ((r"^score_predictor_(\d+)\.(in|out)_conv_(\d)\.", r"score_predictor.\1.\2_conv.\3."),)


class Predictor(nn.Module):
    """Log-probabilities of keeping and of dropping each patch: (B, N, C) -> (B, N, 2) (equations 4-7).

    Half of the channels describe the patch, half the mean of the patches that the policy still keeps.

    Fields:
      epsilon: of the layer norm.
    Raises:
      ValueError: the channels do not divide by 4.
    """

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, patches: jax.Array, policy: jax.Array) -> jax.Array:
        """`policy` (B, N) is 1 for patches that were kept so far, 0 for others."""
        channels = patches.shape[-1]
        if channels % 4:
            raise ValueError(f"a predictor splits its channels by 4: {channels} do not divide")
        options = {"kernel_init": nn.initializers.normal(0.02), "dtype": self.dtype}
        x = LayerNorm(self.epsilon, self.dtype, name="in_conv_0")(patches)
        x = gelu(Dense(channels, name="in_conv_1", **options)(x))
        local, others = jnp.split(x, 2, axis=-1)
        wide = others.astype(accumulation_dtype(others))
        weight = policy.astype(wide.dtype)[..., None]
        count = jnp.sum(weight, axis=1, keepdims=True)
        # An image that keeps nothing has no mean; the official code gives NaN.
        mean = jnp.sum(wide * weight, axis=1, keepdims=True) / jnp.where(count > 0, count, 1)
        x = jnp.concatenate([local, jnp.broadcast_to(mean.astype(x.dtype), local.shape)], axis=-1)
        x = gelu(Dense(channels // 2, name="out_conv_0", **options)(x))
        x = gelu(Dense(channels // 4, name="out_conv_2", **options)(x))
        x = Dense(2, name="out_conv_4", **options)(x)
        return jax.nn.log_softmax(x.astype(accumulation_dtype(x)), axis=-1)

    def noise(self, shape: tuple[int, ...]) -> jax.Array:
        """Gumbel noise of the rng stream `dropout`, (B, N, 2); the same however the batch is split."""
        shares = 1 if scope.axis() is None else jax.lax.axis_size(scope.axis())
        return scope.local(jax.random.gumbel(self.make_rng("dropout"), (shape[0] * shares, *shape[1:]), jnp.float32))


def decide(log_probs: jax.Array, noise: jax.Array, previous: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Hard random decisions with the gradient of the soft ones (equation 8, straight-through): (B, N) of 1 and 0.

    Args:
      log_probs: (B, N, 2), of keeping and dropping.
      noise: Gumbel noise of the same shape; a patch is kept where its first sum is not the smaller one.
      previous: decisions so far (B, N); what was dropped stays dropped.
      temperature: of the softmax whose gradient is taken.
    """
    noisy = log_probs + noise.astype(log_probs.dtype)
    soft = jax.nn.softmax(noisy / temperature, axis=-1)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).astype(soft.dtype)
    return (jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))) * previous


@dataclasses.dataclass(frozen=True)
class DynamicViT(Reduction):
    """See `reduction`; `patches` is what the network begins with."""

    at: tuple[int, ...]
    keep: tuple[float, ...]
    masked: bool = False
    epsilon: float = 1e-5
    patches: int = 0

    def bind(self, depth: int, patches: int, class_token: bool, distilled: bool) -> "DynamicViT":
        bound = dataclasses.replace(super().bind(depth, patches, class_token, distilled), patches=patches)
        if self.at[-1] >= depth:
            raise ValueError(f"at={self.at}: the network has {depth} blocks, counted from 0")
        if bound.count(len(self.at) - 1) < 1:
            raise ValueError(f"keep={self.keep}: the last rate leaves none of {patches} patches")
        return bound

    def count(self, stage: int) -> int:
        """Patches left by a stage in evaluation: rates are relative to what the network began with."""
        return int(self.patches * self.keep[stage])

    def noise(self, predictor: Predictor, stage: int, shape: tuple[int, ...]) -> jax.Array:
        """The noise (B, N, 2) of a stage's decisions."""
        return predictor.noise(shape)

    def left(self, block: int, tokens: int) -> int:
        raise ValueError("DynamicViT changes tokens between blocks: research.tokens.policy_macs counts its work")

    def start(self, x: jax.Array) -> Tokens:
        return super().start(x)._replace(memory=jnp.ones(x.shape[:2], accumulation_dtype(x)))

    def before(self, tokens: Tokens, block: int, train: bool) -> Tokens:
        if block not in self.at:
            return tokens
        stage, policy = self.at.index(block), tokens.memory
        predictor = Predictor(self.epsilon, tokens.x.dtype, name=f"score_predictor_{stage}")
        log_probs = predictor(tokens.x[:, self.prefix :], policy[:, self.prefix :])
        tokens = tokens.noted(block, log_probs=log_probs)
        if train:
            noise = self.noise(predictor, stage, log_probs.shape)
            decision = decide(log_probs, noise, policy[:, self.prefix :])
        else:
            scores = jnp.where(policy[:, self.prefix :] > 0, finite("scores", log_probs[..., 0]), -jnp.inf)
            order = ranked(scores)
            best = order[:, : self.count(stage)]
            if not self.masked:
                return self._gather(tokens, order, block)
            decision = jnp.sum(jax.nn.one_hot(best, scores.shape[1], dtype=policy.dtype), axis=1)
        return tokens._replace(memory=policy.at[:, self.prefix :].set(decision)).noted(block, decision=decision)

    def _gather(self, tokens: Tokens, order: jax.Array, block: int) -> Tokens:
        """The tokens without all but the first of the patches in their `order`."""
        count = self.count(self.at.index(block))
        moves = lost(*jnp.split(policies.behind(self.prefix, order), [self.prefix + count], axis=1))
        policy = jnp.ones(moves.keep.shape, tokens.memory.dtype)
        tokens = tokens._replace(x=rows(tokens.x, moves.keep), origin=follow(tokens.origin, moves), memory=policy)
        return tokens.noted(block, kept=order[:, :count])

    def attend(self, tokens: Tokens, block: int, train: bool, q, k, v, bias, scale) -> tuple[jax.Array, Any]:
        if train or self.masked:
            return policies.attend(q, k, v, tokens.memory, bias, scale), None
        return super().attend(tokens, block, train, q, k, v, bias, scale)


def reduction(
    at: tuple[int, ...] = (3, 6, 9),
    keep: float | tuple[float, ...] = 0.7,
    *,
    masked: bool = False,
    epsilon: float = 1e-5,
) -> DynamicViT:
    """DynamicViT's reduction, for the field `reduce` of a ViT; adds the parameters of one predictor a stage.

    Training draws from the rng stream `dropout`. Endpoints of the block after a predictor, `block04_...`: `log_probs`
    (B, N, 2); in evaluation `kept` (B, M), patches among the current ones, best first; in training, and where `masked`,
    `decision` (B, N), 1 for kept patches.

    Args:
      at: blocks before which a predictor stands, counted from 0.
      keep: share of the first patches that each stage leaves, rounded down; one number r means r, r^2, r^3 ... as in
        the published models.
      masked: evaluate as in training, with all tokens in place and attention masked, on the same patches as without.
      epsilon: of the predictors' layer norm.
    Raises:
      ValueError: blocks that do not ascend, another number of rates than blocks, rates outside (0, 1] or that grow.
    """
    rates = (keep,) if isinstance(keep, float | int) else tuple(keep)
    if len(rates) == 1 < len(at):
        rates = tuple(rates[0] ** (stage + 1) for stage in range(len(at)))
    if not at or list(at) != sorted(set(at)) or at[0] < 0:
        raise ValueError(f"at={at}: name one block or more, in ascending order")
    if len(rates) != len(at):
        raise ValueError(f"keep={keep}: {len(at)} stages take one rate, or {len(at)}")
    if not all(0 < rate <= 1 for rate in rates) or list(rates) != sorted(rates, reverse=True):
        raise ValueError(f"keep={keep}: rates lie in (0, 1] and do not grow")
    return DynamicViT(at=tuple(at), keep=rates, masked=masked, epsilon=epsilon)
