"""Teacher outputs in the form in which they are stored, and back: top-k labels of Dataset Reinforcement and of FKD.

Sparse labels are class indices (B, k) int32 and probabilities (B, k); dense ones are distributions (B, C), which any
loss of labels takes.
"""

import jax
import jax.numpy as jnp

from research.distill.numerics import wide

FORMS = ("smooth", "zeros", "renormalize")


def sparsify(probabilities: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest probabilities of (B, C): their classes (B, k), ascending, and values (B, k).

    Raises:
      ValueError: k is not between 1 and C.
    """
    if not 1 <= k <= probabilities.shape[-1]:
        raise ValueError(f"k={k} of {probabilities.shape[-1]} classes: keep at least one and at most all")
    index = jnp.sort(jax.lax.top_k(probabilities, k)[1], axis=-1)
    return index, jnp.take_along_axis(probabilities, index, axis=-1)


def densify(index: jax.Array, value: jax.Array, num_classes: int, *, form: str = "smooth") -> jax.Array:
    """Distributions (B, C) of sparse labels (B, k), at least float32.

    "smooth" shares the missing mass among the other classes: the default of Dataset Reinforcement (Faghri et al. 2023)
    and FKD's `smoothing` (k = 1) and `marginal_smoothing`. "renormalize" divides by the kept mass: FKD's
    `marginal_renorm` (Shen & Xing 2022). "zeros" is the *softmax* of the kept probabilities, as in ml-dr's code, so
    nearly uniform over the k; "smooth" falls back to it where the kept mass exceeds 1.

    Raises:
      ValueError: another form.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: choose one of {', '.join(FORMS)}")
    (value,) = wide(value)
    rows = jnp.arange(index.shape[0])[:, None]
    mass = jnp.sum(value, axis=-1, keepdims=True)

    def scattered(kept, rest):
        return jnp.broadcast_to(rest, (index.shape[0], num_classes)).at[rows, index].set(kept)

    nothing = jnp.zeros_like(mass)
    if form == "renormalize":
        return scattered(value / jnp.maximum(mass, 1e-12), nothing)
    zeros = scattered(jax.nn.softmax(value), nothing)
    if form == "zeros":
        return zeros
    smooth = scattered(value, (1 - mass) / max(num_classes - index.shape[-1], 1))
    return jnp.where(mass > 1, zeros, smooth)
