"""The meaning of `binary_matmul`, in jnp.

With signs as bits, a product of two is +1 where the bits are equal: over k values the sum is k - 2 ones(a XOR b). Zeros
that fill the last words of both operands are equal bits and so count nothing. Where a value of `a` is 0 neither of the
two terms may count it: ones(m) - 2 ones((a XOR b) AND m), m the mask of values other than 0.
Source: Rastegari et al. 2016, "XNOR-Net" (arXiv 1603.05279, section 3.2), in the XOR form.
"""

import jax
import jax.numpy as jnp

WORD = 32
# Words that one pass over the result adds up: all in registers, and few enough to compile fast.
UNROLLED = 8


def words(k: int) -> int:
    """Number of words that k bits fill."""
    return -(-k // WORD)


def pack_bits(bits: jax.Array) -> jax.Array:
    """Booleans (..., k) -> (..., words(k)) uint32, the first in the lowest bit; zeros fill the last word."""
    k = bits.shape[-1]
    padded = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, words(k) * WORD - k)])
    places = jnp.arange(WORD, dtype=jnp.uint32).reshape(*[1] * bits.ndim, WORD)
    ones = padded.reshape(*bits.shape[:-1], words(k), WORD).astype(jnp.uint32)
    return jnp.sum(ones << places, axis=-1, dtype=jnp.uint32)


def pack_signs(x: jax.Array) -> jax.Array:
    """Signs of (..., k) numbers -> (..., words(k)) uint32: 1 from zero on, 0 below."""
    return pack_bits(x >= 0)


def unpack_signs(packed: jax.Array, k: int, dtype=jnp.float32) -> jax.Array:
    """What `pack_signs` kept of k numbers: (..., words(k)) uint32 -> (..., k) of +1 and -1."""
    places = jnp.arange(WORD, dtype=jnp.uint32).reshape(*[1] * packed.ndim, WORD)
    bits = (packed[..., None] >> places) & jnp.uint32(1)
    bits = bits.reshape(*packed.shape[:-1], -1)[..., :k].astype(dtype)
    return 2 * bits - 1


def binary_matmul(a: jax.Array, b: jax.Array, k: int, nonzero: jax.Array | None) -> jax.Array:
    """(m, w) by (n, w) words of k bits -> (m, n) int32, `nonzero` (m, w) or None; nothing larger is ever held."""
    columns = b.T  # neighbouring results read neighbouring words

    def differing(start: jax.Array | int, count: int) -> jax.Array:
        """Ones in which `count` words from `start` on differ, (m, n)."""
        total = jnp.zeros((a.shape[0], b.shape[0]), jnp.uint32)
        for index in range(count):
            take = lambda plane, axis, index=index: jax.lax.dynamic_index_in_dim(plane, start + index, axis)
            wrong = take(a, 1) ^ take(columns, 0)
            wrong = wrong if nonzero is None else wrong & take(nonzero, 1)
            total = total + jax.lax.population_count(wrong)
        return total

    passes, rest = divmod(a.shape[1], UNROLLED)
    total = differing(passes * UNROLLED, rest)
    if passes:
        total = jax.lax.fori_loop(0, passes, lambda i, total: total + differing(i * UNROLLED, UNROLLED), total)
    signs = 2 * total.astype(jnp.int32)
    if nonzero is None:
        return k - signs
    return jnp.sum(jax.lax.population_count(nonzero), axis=1, dtype=jnp.uint32).astype(jnp.int32)[:, None] - signs
