"""What frozen features are worth: nearest neighbours and few-shot least squares (`linear_probe` has the third).

Features are host arrays, (N, D) float32, labels (N,) integers. The heavy parts are jitted on one device and go through
the data in blocks, so that beside the features themselves memory does not grow with their number.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.core import metrics as metrics_lib
from research.core.overrides import suggest

BLOCK = 4096  # rows of a block
BIAS = 100.0  # the constant feature of `least_squares`
EXACT = jax.lax.Precision.HIGHEST  # float32 products are float32 products, on every device


def pooled(endpoints: dict[str, jax.Array], name: str = "pooled") -> jax.Array:
    """The endpoint as one vector an image, (B, D) float32: maps and tokens (all, class tokens too) are averaged.

    Raises:
      ValueError: no such endpoint, or one that is neither (B, D), (B, N, D) nor (B, H, W, D).
    """
    if name not in endpoints:
        near = suggest(name, list(endpoints))
        raise ValueError(f"endpoint: no {name!r}{near}; the network has {', '.join(endpoints)}")
    x = endpoints[name]
    if x.ndim not in (2, 3, 4):
        raise ValueError(f"endpoint: {name} has shape {x.shape}; it takes vectors, tokens or a map for every image")
    return jnp.mean(x.astype(jnp.float32), axis=tuple(range(1, x.ndim - 1)))


# Nearest neighbours


def knn(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    ks: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    block: int = BLOCK,
) -> dict[str, float]:
    """Accuracy of the vote of the k nearest examples of a bank by cosine, as DINO does it (arXiv 2104.14294, eval_knn).

    A neighbour of cosine c votes with exp(c / temperature) for its class; `plain_top1` counts heads instead, ties going
    to the lower class. Unlike in the official code a class without any vote is never among the first five.

    Args:
      bank: (M, D); bank_labels: (M,); features: (N, D); labels: (N,); block: rows of either side at a time.
    Returns:
      For every k: `k<k>/top1`, `k<k>/top5`, `k<k>/plain_top1`.
    Raises:
      ValueError: a k below 1 or above M.
    """
    check_neighbours(ks, len(bank))
    parts, voters = jnp.asarray(blocks(bank, block)), jnp.asarray(bank_labels, jnp.int32)
    rows, own = blocks(features, block), blocks(np.asarray(labels, np.int32), block)
    mask = blocks(np.ones(len(features), np.float32), block)
    score = functools.partial(_score, num_classes=num_classes, ks=tuple(ks), temperature=temperature)
    pairs = [jax.device_get(score(parts, voters, *part)) for part in zip(rows, own, mask, strict=True)]
    found = metrics_lib.finish(metrics_lib.merge(*pairs))
    return {key: found[key] for key in (f"k{k}/{name}" for k in ks for name in ("top1", "top5", "plain_top1"))}


def check_neighbours(ks: Sequence[int], count: int) -> None:
    """Raises ValueError where a bank of `count` examples has no `k` neighbours, for some k."""
    for k in ks:
        if not 1 <= k <= count:
            raise ValueError(f"k: {k} neighbours of a bank of {count} examples; it takes 1 to {count}")


@functools.partial(jax.jit, static_argnames=("num_classes", "ks", "temperature"))
def _score(bank, bank_labels, rows, own, mask, *, num_classes, ks, temperature):
    cosines, places = nearest(bank, len(bank_labels), rows, max(ks))
    found = {}
    for k in ks:
        voters = bank_labels[places[:, :k]]
        weighted = votes(jnp.exp((cosines[:, :k] - cosines[:, :1]) / temperature), voters, num_classes)
        plain = votes(jnp.ones_like(cosines[:, :k]), voters, num_classes)
        voted = mask * jnp.take_along_axis(plain > 0, own[:, None], axis=1)[:, 0].astype(mask.dtype)
        found[f"k{k}/top1"] = metrics_lib.topk_correct(weighted, own, mask, 1)
        found[f"k{k}/top5"] = metrics_lib.topk_correct(weighted, own, voted, 5)[0], jnp.sum(mask)
        found[f"k{k}/plain_top1"] = metrics_lib.topk_correct(plain, own, mask, 1)
    return found


def nearest(bank: jax.Array, count: int, rows: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and places of the k nearest examples, nearest first, ties in the order of the bank.

    Args:
      bank: (blocks, B, D), of which the first `count` rows are real; rows: (N, D).
    Returns:
      (N, k) cosines, (N, k) int32 places in the bank.
    """
    rows, size = _unit(rows), bank.shape[1]

    def step(best, block):
        start, examples = block
        places = start + jnp.arange(size, dtype=jnp.int32)[None, :]
        cosines = jnp.matmul(rows, _unit(examples).T, precision=EXACT)
        cosines = jnp.concatenate([best[0], jnp.where(places < count, cosines, -jnp.inf)], axis=1)
        places = jnp.concatenate([best[1], jnp.broadcast_to(places, (len(rows), size))], axis=1)
        cosines, order = jax.lax.top_k(cosines, k)
        return (cosines, jnp.take_along_axis(places, order, axis=1)), None

    none = jnp.full((len(rows), k), -jnp.inf, rows.dtype), jnp.zeros((len(rows), k), jnp.int32)
    starts = size * jnp.arange(len(bank), dtype=jnp.int32)
    return jax.lax.scan(step, none, (starts, bank))[0]


def votes(weights: jax.Array, voters: jax.Array, num_classes: int) -> jax.Array:
    """Sums of the weights (N, k) of the neighbours of each class `voters` (N, k): (N, num_classes)."""
    row = jnp.arange(len(weights))[:, None]
    return jnp.zeros((len(weights), num_classes), weights.dtype).at[row, voters].add(weights)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def blocks(x: np.ndarray, size: int) -> np.ndarray:
    """Host array (N, ...) as (blocks, size, ...), zeros behind; one block no larger than needed where one is enough."""
    size = min(size, len(x))
    count = -(-len(x) // size)
    padded = np.zeros((count * size, *x.shape[1:]), x.dtype)
    padded[: len(x)] = x
    return padded.reshape(count, size, *x.shape[1:])


# Few-shot least squares


class LeastSquares(NamedTuple):
    """A ridge regression for every strength: weights are `left @ diag(1 / (eigenvalues + l2)) @ right`."""

    mean: np.ndarray
    std: np.ndarray
    eigenvalues: np.ndarray
    left: np.ndarray
    right: np.ndarray


def few(labels: np.ndarray, shots: int, num_classes: int, seed: int) -> np.ndarray:
    """Places of `shots` random examples of every class: those that big_vision draws for this seed and order of data.

    Raises:
      ValueError: a class has fewer.
    """
    check_shots(shots, labels, num_classes)
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(num_classes)])


def check_shots(shots: int, labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError where a class has no `shots` examples; the official code takes what there is."""
    counts = np.bincount(labels, minlength=num_classes)
    if not 1 <= shots <= counts.min():
        raise ValueError(f"shots: {shots} of each class, but class {counts.argmin()} has {counts.min()} examples")


def least_squares(features: np.ndarray, labels: np.ndarray, num_classes: int) -> LeastSquares:
    """Regression of targets -1 and 1 on standardised features and a constant one, for any L2 strength at once.

    As big_vision's fewshot_lsr: features have mean 0 and deviation 1 (+ 1e-5) over these examples; the constant is 100,
    so that the bias is nearly free of the penalty. It solves in float32; this is float64, on the host, because with a
    small strength the eigenvalues (up to N * 1e4) leave nothing of float32.

    Args:
      features: (N, D); labels: (N,).
    """
    x = np.asarray(features, np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    x = _with_constant((x - mean) / std)
    y = 2.0 * np.eye(num_classes)[labels] - 1.0
    if len(x) >= x.shape[1]:
        eigenvalues, q = np.linalg.eigh(x.T @ x)
        return LeastSquares(mean, std, eigenvalues, q, q.T @ (x.T @ y))
    eigenvalues, q = np.linalg.eigh(x @ x.T)
    return LeastSquares(mean, std, eigenvalues, x.T @ q, q.T @ y)


def regressed(fit: LeastSquares, features: np.ndarray, l2: float) -> np.ndarray:
    """Scores (N, C) of features (N, D) by the regression of strength `l2` > 0; the largest is the predicted class."""
    weights = (fit.left / (fit.eigenvalues + l2)) @ fit.right
    return _with_constant((features - fit.mean) / fit.std) @ weights


def _with_constant(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, 1)), constant_values=BIAS)
