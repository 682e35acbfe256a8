"""Contrastive representation distillation (CRD): losses against a memory of all training examples.

Tian et al. 2020. The state is functional: `crd` takes a `Memory` and returns the updated one. Where the batch is split
over a mapped axis, all shares enter the memory, so it stays equal everywhere.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.core import scope
from research.distill.features import TORCH_INIT
from research.distill.numerics import unit, wide

# Candidates whose (B, candidates, d) memory rows are gathered at a time.
_CANDIDATES = 512
_EPS = 1e-7


class Memory(NamedTuple):
    """Embeddings of all N examples and the normalisers of both directions.

    Attributes:
      student, teacher: (N, d) unit vectors, once visited.
      log_z: (2,) log normalisers of the student's and the teacher's scores, frozen after the first batch.
      ready: () 0 before the first batch, 1 after.
    """

    student: jax.Array
    teacher: jax.Array
    log_z: jax.Array
    ready: jax.Array


def empty(key: jax.Array, num_examples: int, dim: int, dtype=jnp.float32) -> Memory:
    """A memory of random rows, uniform within +-1/sqrt(d/3) and so of about unit length."""
    bound = (dim / 3) ** -0.5
    rows = jax.random.uniform(key, (2, num_examples, dim), dtype, -bound, bound)
    return Memory(rows[0], rows[1], jnp.zeros(2, dtype), jnp.zeros((), dtype))


class Embed(nn.Module):
    """Linear map to `dim` and L2 normalisation: (B, ...) -> (B, dim)."""

    dim: int = 128
    normalize: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.dim, kernel_init=TORCH_INIT, dtype=self.dtype, name="linear")(x.reshape(x.shape[0], -1))
        return unit(x) if self.normalize else x


class EmbedPair(nn.Module):
    """Embeddings of the student's and the teacher's features, both trained."""

    dim: int = 128
    normalize: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
        options = (self.dim, self.normalize, self.dtype)
        return Embed(*options, name="embed_s")(student), Embed(*options, name="embed_t")(jax.lax.stop_gradient(teacher))


def _log_scores(rows: jax.Array, candidates: jax.Array, vectors: jax.Array, temperature: float) -> jax.Array:
    """<rows[candidates[b, k]], vectors[b]> / temperature, (B, K + 1)."""

    @jax.checkpoint
    def column(index):
        return jnp.sum(rows[index].astype(vectors.dtype) * vectors, axis=-1)

    return jax.lax.map(column, candidates.T, batch_size=_CANDIDATES).T / temperature


def _log_normalizer(scores: jax.Array, num_examples: int) -> jax.Array:
    """log(N * mean(exp(scores))) over the whole batch."""
    scores = scope.gather(jax.nn.logsumexp(jax.lax.stop_gradient(scores), axis=-1) - np.log(scores.shape[-1]))
    return jax.nn.logsumexp(scores) - np.log(scores.shape[0]) + np.log(num_examples)


def _contrast(log_p: jax.Array, num_examples: int) -> jax.Array:
    """-log h of the positive and of the negatives, summed, (B,): noise-contrastive estimation, eq. 18-19."""
    noise = (log_p.shape[-1] - 1) / num_examples
    log_total = jnp.logaddexp(log_p, jnp.log(noise + _EPS).astype(log_p.dtype))
    return log_total[:, 0] - log_p[:, 0] + jnp.sum(log_total[:, 1:] - np.log(noise), axis=-1)


def _updated(rows: jax.Array, index: jax.Array, vectors: jax.Array, momentum: float) -> jax.Array:
    index, vectors = scope.gather((index, jax.lax.stop_gradient(vectors)))
    new = unit(momentum * rows[index].astype(vectors.dtype) + (1 - momentum) * vectors)
    # Of an example that the batch holds twice, the last one enters: scattering equal indices has no order of its own.
    again = jnp.any(jnp.triu(index[:, None] == index[None, :], k=1), axis=1)
    return rows.at[jnp.where(again, rows.shape[0], index)].set(new.astype(rows.dtype), mode="drop")


def crd(
    student: jax.Array,
    teacher: jax.Array,
    memory: Memory,
    index: jax.Array,
    negatives: jax.Array,
    *,
    temperature: float = 0.07,
    momentum: float = 0.5,
) -> tuple[jax.Array, Memory]:
    """CRD's loss, (B,), and the memory after the batch.

    Each example's embedding is scored against its own row of the *other* network's memory and against the rows of K
    negatives: P = exp(score / temperature) / Z with Z = N * mean, taken from the first batch and kept. The loss is
    -log P/(P + K/N) of the positive - sum log (K/N)/(P + K/N) of the negatives, for both directions. Afterwards the
    example's rows become norm(momentum * row + (1 - momentum) * embedding).

    Args:
      student, teacher: (B, d) unit embeddings, both trained.
      memory: see `Memory`.
      index: (B,) int, the examples' rows in the memory.
      negatives: (B, K) int, rows of other classes (`negative_sampler`).
    """
    student, teacher = wide(student, teacher)
    candidates = jnp.concatenate([index[:, None], negatives], axis=1)
    num_examples = memory.student.shape[0]
    scores = [
        _log_scores(rows, candidates, vectors, temperature)
        for rows, vectors in ((memory.teacher, student), (memory.student, teacher))
    ]
    first = jnp.stack([_log_normalizer(s, num_examples) for s in scores])
    log_z = jnp.where(memory.ready > 0, memory.log_z.astype(first.dtype), first)
    loss = sum(_contrast(s - z, num_examples) for s, z in zip(scores, log_z, strict=True))
    updated = (_updated(r, index, v, momentum) for r, v in ((memory.student, student), (memory.teacher, teacher)))
    return loss, Memory(*updated, log_z.astype(memory.log_z.dtype), jnp.ones_like(memory.ready))


def negative_sampler(labels: np.ndarray, count: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function (key, index (B,)) -> (B, count) int32: rows of other classes, uniform and with replacement.

    What an example draws depends on the key and its own index only, so the draw is the same on any number of devices.

    Args:
      labels: (N,) class of every training example. Equal numbers mark what may not be drawn together: `np.arange(N)`
        excludes only the example itself.
    Raises:
      ValueError: all examples are of one class.
    """
    _, classes, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise ValueError(f"crd: all {len(classes)} training examples are of one class, there is nothing to contrast")
    order = np.argsort(classes, kind="stable").astype(np.int32)
    starts = np.cumsum(counts) - counts
    tables = [x.astype(np.int32) for x in (order, classes, counts, starts)]

    def sample(key, index):
        order, classes, counts, starts = map(jnp.asarray, tables)

        def draw(row):
            own, start = counts[classes[row]], starts[classes[row]]
            position = jax.random.randint(jax.random.fold_in(key, row), (count,), 0, order.shape[0] - own, jnp.int32)
            # Positions from the own class's first on are those behind it in the order of classes.
            return order[jnp.where(position >= start, position + own, position)]

        return jax.vmap(draw)(index)

    return sample
