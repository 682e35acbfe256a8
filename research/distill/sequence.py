"""Divergences between the next-token distributions of two language models, token by token.

All functions take logits (..., V) of any float dtype, the teacher's as constants, and return one value a token, (...).
They share the signature of `logits`, so they compare classifiers as well; `labels` plays no part in the values and
says with `token_mean` which tokens count. Tokens of the vocabulary that either model excludes by a logit of minus
infinity contribute nothing. There is no T^2 in any of them.
"""

import math

import jax
import jax.numpy as jnp

from research.distill.numerics import wide

IGNORED = -100


def token_mean(
    values: jax.Array,
    labels: jax.Array | None = None,
    *,
    count: jax.Array | float | None = None,
    ignore: int = IGNORED,
) -> jax.Array:
    """Sum of the values (B, N) of tokens whose label is not `ignore`, over their number.

    Args:
      labels: (B, N) int; without labels the sum is over the number of sequences B, as TRL has it.
      count: what to divide by instead, such as the number of tokens of all accumulated batches.
    """
    if labels is None:
        return jnp.sum(values) / (values.shape[0] if count is None else count)
    used = labels != ignore
    count = jnp.maximum(jnp.sum(used), 1).astype(values.dtype) if count is None else count
    return jnp.sum(jnp.where(used, values, 0)) / count


def _log_probabilities(student: jax.Array, teacher: jax.Array, temperature: float = 1.0):
    """log p of both, and which entries neither excludes; excluded entries read 0 and must be masked."""
    student, teacher = wide(student, jax.lax.stop_gradient(teacher))
    used = jnp.isfinite(student) & jnp.isfinite(teacher)
    return *(jnp.where(used, jax.nn.log_softmax(z / temperature), 0) for z in (student, teacher)), used


def _expected(log_p: jax.Array, value: jax.Array, used: jax.Array) -> jax.Array:
    """sum_v p_v value_v over the used entries."""
    return jnp.sum(jnp.where(used, jnp.exp(log_p) * value, 0), axis=-1)


def _mixture(log_p: jax.Array, log_q: jax.Array, weight: float | jax.Array) -> jax.Array:
    """log(weight p + (1 - weight) q), finite also where both underflow."""
    weight = jnp.asarray(weight, log_p.dtype)
    return jnp.logaddexp(log_p + jnp.log(weight), log_q + jnp.log1p(-weight))


def forward_kl(
    student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None, *, entropy: bool = False
) -> jax.Array:
    """KL(t || s), by default without the teacher's constant entropy, as in DistiLLM."""
    log_s, log_t, used = _log_probabilities(student, teacher)
    return _expected(log_t, log_t - log_s if entropy else -log_s, used)


def reverse_kl(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """KL(s || t). Gu et al. 2024 (MiniLLM)."""
    log_s, log_t, used = _log_probabilities(student, teacher)
    return _expected(log_s, log_s - log_t, used)


def symmetric_kl(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    lam: float | jax.Array = 0.9,
    entropy: bool = False,
) -> jax.Array:
    """(1 - lam) KL(t || s) + lam KL(s || t); `entropy` as in `forward_kl`."""
    forward = forward_kl(student, teacher, entropy=entropy)
    return (1 - lam) * forward + lam * reverse_kl(student, teacher)


def js(
    student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None, *, lam: float | jax.Array = 0.9
) -> jax.Array:
    """lam KL(s || m) + (1 - lam) KL(t || m), m = (1 - lam) t + lam s: DistiLLM's Jensen-Shannon divergence.

    `jsd` with beta = 1 - lam. `lam` lies strictly between 0 and 1.
    """
    return _jensen(*_log_probabilities(student, teacher), 1 - lam)


def _jensen(log_s: jax.Array, log_t: jax.Array, used: jax.Array, beta: float | jax.Array) -> jax.Array:
    mixed = _mixture(log_t, log_s, beta)
    return beta * _expected(log_t, log_t - mixed, used) + (1 - beta) * _expected(log_s, log_s - mixed, used)


def jsd(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    beta: float | jax.Array = 0.5,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s: generalised JSD of GKD.

    The numbers 0 and 1 stand for KL(t || s) and KL(s || t), which are the limits of the divergence over beta and over
    1 - beta; a traced `beta` lies strictly between. Agarwal et al. 2024, as in TRL.
    """
    log_s, log_t, used = _log_probabilities(student, teacher, temperature)
    if not isinstance(beta, jax.Array) and math.isclose(beta, 0):
        return _expected(log_t, log_t - log_s, used)
    if not isinstance(beta, jax.Array) and math.isclose(beta, 1):
        return _expected(log_s, log_s - log_t, used)
    return _jensen(log_s, log_t, used, beta)


def total_variation(student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None) -> jax.Array:
    """sum_v |t_v - s_v| / 2. Wen et al. 2023 (f-DISTILL)."""
    log_s, log_t, used = _log_probabilities(student, teacher)
    return jnp.sum(jnp.where(used, jnp.abs(jnp.exp(log_t) - jnp.exp(log_s)) / 2, 0), axis=-1)


def skewed_kl(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array | None = None,
    *,
    lam: float | jax.Array = 0.1,
    entropy: bool = False,
) -> jax.Array:
    """KL(t || lam t + (1 - lam) s), by default without the teacher's entropy. Ko et al. 2024 (DistiLLM)."""
    log_s, log_t, used = _log_probabilities(student, teacher)
    mixed = _mixture(log_t, log_s, lam)
    return _expected(log_t, log_t - mixed if entropy else -mixed, used)


def skewed_reverse_kl(
    student: jax.Array, teacher: jax.Array, labels: jax.Array | None = None, *, lam: float | jax.Array = 0.1
) -> jax.Array:
    """KL(s || lam s + (1 - lam) t). Ko et al. 2024 (DistiLLM)."""
    log_s, log_t, used = _log_probabilities(student, teacher)
    return _expected(log_s, log_s - _mixture(log_s, log_t, lam), used)
