"""Dense layers over many leading axes."""

import functools

import jax
from flax import linen as nn


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, precision=None, preferred_element_type=None):
    """`lax.dot_general` of a dense layer: (..., C) by (C, F) gives (..., F).

    On CPU the leading axes are made one. XLA's gradient for the kernel would otherwise contract two axes and so copies
    its operands transposed, which makes a training step of DeiT-S a third slower; elsewhere joining axes costs copies.
    """
    product = functools.partial(jax.lax.dot_general, precision=precision, preferred_element_type=preferred_element_type)
    if x.ndim <= 2:
        return product(x, kernel, dimension_numbers)

    def rows(x, kernel):
        y = product(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())))
        return y.reshape(*x.shape[:-1], kernel.shape[-1])

    plain = functools.partial(product, dimension_numbers=dimension_numbers)
    return jax.lax.platform_dependent(x, kernel, cpu=rows, default=plain)


Dense = functools.partial(nn.Dense, dot_general=dot_general)
