"""Linear probe: multinomial logistic regression on frozen features, its L2 strength chosen as CLIP chooses it.

Features are host arrays, (N, D) float32, labels (N,) integers. Training is one jitted program on one device, the same
for every strength and choice of examples; logits are made in blocks of rows.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.backbones.probe import BLOCK, EXACT, blocks

GRID = 8  # strengths a decade in `strongest`
DECADES = 12  # that it covers, from 1e-6


class Linear(NamedTuple):
    """A classifier `features @ kernel + bias`, (D, C) and (C,), and the steps its training took."""

    kernel: np.ndarray
    bias: np.ndarray
    steps: int

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Logits (N, C) of features (N, D)."""
        return features @ self.kernel + self.bias


def logistic(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    l2: float,
    *,
    chosen: np.ndarray | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-6,
    block: int = BLOCK,
) -> Linear:
    """Multinomial logistic regression: the least sum of cross-entropies + l2 / 2 |kernel|^2, by L-BFGS on all examples.

    The optimum of scikit-learn's `LogisticRegression(C=1 / l2)`. Inside, features are centred and divided by one
    number, which changes the path but, as the bias is free, not the optimum.

    Args:
      features: (N, D); labels: (N,).
      chosen: (N,) bool, the examples to train on; all by default.
      max_steps: 1000 as in CLIP's protocol.
      tolerance: on the largest entry of the gradient of the mean cross-entropy, for features of deviation 1.
      block: rows of logits held at a time.
    """
    chosen = np.ones(len(features), bool) if chosen is None else chosen
    dtype, own = features.dtype, chosen[:, None]
    mean = np.mean(features, 0, np.float64, where=own).astype(dtype)
    x = features - mean
    scale = np.sqrt(np.mean(np.square(x), dtype=np.float64, where=own)).astype(dtype) or dtype.type(1)
    examples = x / scale, np.asarray(labels, np.int32), chosen.astype(dtype)
    strength = dtype.type(l2 / chosen.sum() / np.float64(scale) ** 2)
    # optax does not pass strict promotion.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        parts = tuple(blocks(part, block) for part in examples)
        kernel, bias, steps = jax.device_get(_fit(parts, strength, num_classes, max_steps, tolerance))
    kernel = kernel / scale
    return Linear(kernel, bias - mean @ kernel, int(steps))


@functools.partial(jax.jit, static_argnames="num_classes")
def _fit(parts, strength, num_classes, max_steps, tolerance):
    examples = jnp.sum(parts[2])

    def value(params):
        @jax.checkpoint
        def add(total, part):
            rows, labels, mask = part
            logits = jnp.matmul(rows, params["kernel"], precision=EXACT) + params["bias"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return total + jnp.sum(losses * mask), None

        total, _ = jax.lax.scan(add, jnp.zeros_like(examples), parts)
        return total / examples + strength / 2 * jnp.sum(jnp.square(params["kernel"]))

    solver, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(value)

    def step(carry):
        params, state, steps, _ = carry
        loss, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=loss, grad=grad, value_fn=value)
        slope = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(optax.tree.get(state, "grad"))]))
        return optax.apply_updates(params, updates), state, steps + 1, slope

    def unfinished(carry):
        return (carry[3] > tolerance) & (carry[2] < max_steps)

    dtype = parts[0].dtype
    start = {"kernel": jnp.zeros((parts[0].shape[-1], num_classes), dtype), "bias": jnp.zeros(num_classes, dtype)}
    begin = start, solver.init(start), jnp.int32(0), jnp.asarray(jnp.inf, dtype)
    params, _, steps, _ = jax.lax.while_loop(unfinished, step, begin)
    return params["kernel"], params["bias"], steps


def strongest(score: Callable[[float], float]) -> float:
    """The strength with the best score among 97 from 1e-6 to 1e6, found with 15 of them or fewer.

    CLIP's search (arXiv 2103.00020, A.3): seven strengths two decades apart, then the neighbours of the best at half
    the distance, until they are an eighth of a decade apart. Of equally good ones the largest is taken.
    """
    last, scores = GRID * DECADES, {}
    strength = lambda place: 10.0 ** (place / GRID - DECADES / 2)
    best = lambda: max(scores, key=lambda place: (scores[place], place))
    distance = 2 * GRID
    scores.update((place, score(strength(place))) for place in range(0, last + 1, distance))
    while distance := distance // 2:
        centre = best()
        near = [place for place in (centre - distance, centre + distance) if 0 <= place <= last]
        scores.update((place, score(strength(place))) for place in near)
    return strength(best())


def held_out(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """(N,) bool: a random fifth of every class, rounded down, on which `strongest` can choose.

    Raises:
      ValueError: no class has five examples.
    """
    rng, chosen = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = rng.permutation(np.flatnonzero(labels == label))
        chosen[places[: len(places) // 5]] = True
    if not chosen.any():
        raise ValueError("no class has the five training examples that it takes to hold one out and choose l2: give it")
    return chosen
