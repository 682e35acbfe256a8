"""Linear CKA: how alike two networks see a batch, whatever the widths and the order of their features.

Source: Kornblith et al. 2019 (arXiv 1905.00414, section 3); over minibatches with the unbiased estimator of Song et
al. 2012 as Nguyen et al. 2021 (arXiv 2010.15327, section 2.1) sum it. OFA-KD (arXiv 2310.19444, figure 2) maps
heterogeneous teachers and students with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.distill.numerics import gram, wide


class Sums(NamedTuple):
    """HSIC summed over batches: of every pair (P, Q), and of each of the first (P,) and the second (Q,) with itself."""

    cross: jax.Array
    first: jax.Array
    second: jax.Array


def _centred_gram(x: jax.Array, unbiased: bool) -> jax.Array:
    """The Gram matrix of (n, ...) features as a vector (n * n,), whose inner products are HSIC times a constant.

    Centring on both sides gives the biased estimator. U-centring, which lets the diagonal be zero, gives the unbiased
    one: <K, L> = tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2) of the matrices without their diagonals.
    """
    (x,) = wide(x.reshape(x.shape[0], -1))
    n = x.shape[0]
    # A common shift changes neither estimator, and costs digits if left in.
    x = x - jnp.mean(x, axis=0, keepdims=True)
    products = gram(x, x)
    if not unbiased:
        return products.reshape(-1)
    off = ~jnp.eye(n, dtype=jnp.bool_)
    products = jnp.where(off, products, 0)
    rows = jnp.sum(products, axis=1, keepdims=True) / (n - 2)
    total = jnp.sum(rows) / (n - 1)
    return jnp.where(off, products - rows - rows.T + total, 0).reshape(-1)


def sums(first: Sequence[jax.Array], second: Sequence[jax.Array], *, unbiased: bool = True) -> Sums:
    """HSIC between the features of one batch, each (n, ...) and flattened.

    Add the `Sums` of batches with `jax.tree.map(jnp.add, ...)`, and take their `similarity`.

    Args:
      unbiased: tr(KHLH) / (n - 1)^2 where False.
    Raises:
      ValueError: features of different batches, or fewer examples than the estimator takes (4, biased 2).
    """
    sizes = {x.shape[0] for x in (*first, *second)}
    least = 4 if unbiased else 2
    if len(sizes) != 1 or min(sizes) < least:
        raise ValueError(f"cka compares features of one batch of {least} examples or more, not of {sorted(sizes)}")
    (n,) = sizes
    rows, columns = (jnp.stack([_centred_gram(x, unbiased) for x in side]) for side in (first, second))
    rows, columns = wide(rows, columns)
    scale = n * (n - 3) if unbiased else (n - 1) ** 2
    own = lambda x: jnp.sum(jnp.square(x), axis=-1) / scale
    return Sums(gram(rows, columns) / scale, own(rows), own(columns))


def similarity(found: Sums) -> jax.Array:
    """CKA (P, Q) of summed HSIC; 0 where features do not vary."""
    squared = found.first[:, None] * found.second[None, :]
    varies = squared > 0
    return jnp.where(varies, found.cross / jnp.sqrt(jnp.where(varies, squared, 1)), 0)


def cka(first: jax.Array, second: jax.Array, *, unbiased: bool = False) -> jax.Array:
    """CKA of two features (n, ...) of one batch, a scalar; the biased one lies in [0, 1]."""
    return similarity(sums([first], [second], unbiased=unbiased))[0, 0]


def between(
    first: Callable[[jax.Array], Mapping[str, jax.Array]],
    second: Callable[[jax.Array], Mapping[str, jax.Array]],
    batches: Iterable[jax.Array],
    *,
    unbiased: bool = True,
) -> tuple[np.ndarray, list[str], list[str]]:
    """CKA between all endpoints of two networks over batches of images.

    Args:
      first, second: images (n, H, W, 3) -> endpoints by name, such as `lambda x: network.apply(params, state, x)[1]`.
      batches: arrays of images; batches of one size compile once.
    Returns:
      (matrix (P, Q), names of its rows, names of its columns), the names in the order of the networks.
    Raises:
      ValueError: no batches, or batches too small for the estimator.
    """
    names: list[list[str]] = [[], []]

    @jax.jit
    def one(images):
        endpoints = first(images), second(images)
        # The order of a dictionary's keys survives tracing, but not jit's boundary.
        names[:] = [list(found) for found in endpoints]
        return sums(*(list(found.values()) for found in endpoints), unbiased=unbiased)

    total = None
    for images in batches:
        found = one(images)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("cka: no batches of images to compare the networks on")
    return np.asarray(similarity(total)), *names


def heatmap(axes, matrix: np.ndarray, rows: Sequence[str], columns: Sequence[str]):
    """Draws a matrix of `between` into matplotlib `axes`, the first layers at the bottom left; returns the image."""
    image = axes.imshow(matrix, origin="lower", vmin=0, vmax=1, cmap="magma")
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(rows)), rows)
    return image
