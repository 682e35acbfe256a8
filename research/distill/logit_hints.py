"""Hint methods on logits that train something of their own: CTKD's temperature, USKD's weak head, MEAL V2's judge."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import scope
from research.distill import ensembles, label_aware, taps
from research.distill import temperature as learned
from research.distill.features import TORCH_INIT
from research.distill.hints import Hint, adapted, zeros


def ctkd(*, epochs: float = 10, end: float = -1.0, shape: str = "cosine", low: float = 1.0, span: float = 20.0) -> Hint:
    """Curriculum temperature: `temperature.ctkd` with a trained theta whose gradient turns against it over `epochs`."""

    def init(key, student, teacher):
        return {"theta": jnp.full((), learned.THETA)}, {}

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        # The schedule counts epochs from 1.
        strength = learned.strength(epoch + 1, epochs=epochs, end=end, shape=shape)
        logits = (taps.tap(endpoints, "logits") for endpoints in (student, teacher))
        return jnp.mean(learned.ctkd(*logits, params["theta"], strength=strength, low=low, span=span)), state

    return Hint(init, apply)


def uskd(
    *,
    student: str = "stage3",
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """Universal self-knowledge distillation: `label_aware.uskd` with a linear head on a middle map.

    The teacher is idle. Over groups of `group` examples (None: the batch).

    Raises:
      ValueError: at apply, no labels.
    """

    def middle(endpoints):
        return jnp.mean(taps.feature_map(endpoints, student), axis=(1, 2))

    def head(endpoints):
        return nn.Dense(taps.tap(endpoints, "logits").shape[-1], kernel_init=TORCH_INIT, dtype=dtype)

    def init(key, own, teacher):
        return head(own).init(key, middle(zeros(own)))["params"], {}

    def apply(params, state, own, teacher, *, labels=None, index=None, key=None, epoch=0):
        if labels is None:
            raise ValueError("uskd needs the labels")
        weak = head(own).apply({"params": params}, middle(own))
        loss = lambda *arrays: label_aware.uskd(*arrays, alpha=alpha, beta=beta, mu=mu)
        return scope.by_group(loss, group, taps.tap(own, "logits"), weak, labels), state

    return Hint(init, apply)


class _Judge(nn.Module):
    reduction: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
        judge = ensembles.Discriminator(self.reduction, self.dtype, name="discriminator")
        return judge(student), judge(teacher)


def discriminator(*, reduction: int = 8, dtype: jnp.dtype = jnp.float32) -> Hint:
    """MEAL V2's discriminator of logits: `ensembles.discriminate`, beside `loss='meal'`."""

    def call(student, teacher, key):
        return _Judge(reduction, dtype), (taps.tap(student, "logits"), taps.tap(teacher, "logits"))

    return adapted(call, lambda out, teacher, epoch: ensembles.discriminate(*out), normed=False)
