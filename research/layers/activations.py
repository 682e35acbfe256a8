"""Activations by the names that Hugging Face's configs give them."""

import functools
from collections.abc import Callable

from flax import linen as nn

from research.layers.mlp import gelu, quick_gelu

_TANH_GELU = functools.partial(nn.gelu, approximate=True)
ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": gelu,
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "quick_gelu": quick_gelu,
    "silu": nn.silu,
    "swish": nn.silu,
}


def activation(name: str) -> Callable:
    """The function called `name`; `gelu` is the exact one, `gelu_new` its tanh approximation.

    Raises:
      ValueError: none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
