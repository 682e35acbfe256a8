"""Dynamic convolution: several expert kernels, mixed anew for every example.

Sources: Yang et al. 2019, "CondConv" (arXiv 1904.04971); ParameterNet, Han et al. 2024 (arXiv 2306.14525, section 3.2),
whose code, unlike the paper's text, routes by a single dense layer.

The kernels are mixed first, by one matrix product with all experts, and then applied: the M experts cost parameters and
M |W| multiply-adds an example, not M convolutions. Applying a kernel an example is a batched matrix product over the
pixels (of their neighbourhoods, where the kernel is larger), or for depthwise kernels `layers.depthwise`. On a CPU
(2 cores, float32, 8 examples, forward / with gradients), against a loop over the examples and a vmapped convolution:

    layer                        this            loop over examples   vmap
    1x1, 136 -> 128, 28x28       2.1 / 4.2 ms    2.7 / 8.8 ms         5.1 / 88 ms
    1x1, 304 -> 912, 7x7         3.3 / 9.2 ms    2.9 / 8.7 ms         8.8 / 38 ms
    3x3 stride 2, 3 -> 32, 224   5.5 / 11 ms     9.3 / 28 ms          30 / 296 ms
    depthwise 3x3, 128, 28x28    0.9 / 5.9 ms    24 / 59 ms           25 / 240 ms
    depthwise 3x3, 912, 7x7      0.4 / 4.8 ms    12 / 201 ms          12 / 1725 ms
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.depthwise import depthwise_conv, per_example_conv, taps
from research.layers.init import torch_bias, torch_linear
from research.layers.norm import accumulation_dtype


def mixed_conv(x: jax.Array, kernels: jax.Array, *, stride: int = 1, padding: int = 0) -> jax.Array:
    """Every example convolved with its own kernel: (B, H, W, I) -> (B, H', W', O).

    Args:
      kernels: (B, O, I / groups, k, k); the groups follow from the sizes.
    Raises:
      ValueError: the channels do not divide into groups.
    """
    _, features, inputs, side, _ = kernels.shape
    channels = x.shape[-1]
    if channels % inputs or features % (channels // inputs):
        raise ValueError(f"{channels} channels do not fit kernels of {inputs} inputs and {features} outputs")
    if inputs == 1 and features == channels > 1:
        return depthwise_conv(x, jnp.moveaxis(kernels[:, :, 0], 1, -1), stride, padding)
    if inputs < channels:
        return per_example_conv(x, jnp.transpose(kernels, (0, 3, 4, 2, 1)), stride, padding, channels // inputs)
    patches = jnp.stack(taps(x, side, stride, padding), axis=-1)  # (B, H', W', I, k * k), as the kernels lie
    shape = (*patches.shape[:3], features)
    rows = patches.reshape(x.shape[0], shape[1] * shape[2], -1)
    return jnp.einsum("bpi,boi->bpo", rows, kernels.reshape(*kernels.shape[:2], -1)).reshape(shape)


class DynamicConv(nn.Module):
    """Convolution without bias whose kernel is a sum of experts, weighted for every example: (B, H, W, C) -> maps.

    The weights are the sigmoid of a dense layer over the mean of the map. Means, weights and mixed kernels are float32
    or better; the convolution is of `dtype`.

    Fields:
      padding: symmetric, (kernel_size - 1) // 2 by default.
      num_experts: M. The experts lie flat, (M, features * C / groups * k * k), as in official checkpoints.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    padding: int | None = None
    groups: int = 1
    num_experts: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, side = x.shape[-1], self.kernel_size
        wide = accumulation_dtype(x)
        pooled = jnp.mean(x.astype(wide), axis=(1, 2))
        routing = nn.sigmoid(torch_linear(self.num_experts, channels, dtype=wide, name="routing")(pooled))
        shape = (self.features, channels // self.groups, side, side)
        fan_in = math.prod(shape[1:])
        experts = _Experts((self.num_experts, math.prod(shape)), fan_in, name="cond_conv")()
        kernels = (routing @ experts.astype(wide)).astype(self.dtype).reshape(-1, *shape)
        pad = (side - 1) // 2 if self.padding is None else self.padding
        return mixed_conv(x.astype(self.dtype), kernels, stride=self.stride, padding=pad)


class _Experts(nn.Module):
    """The expert kernels, a module of their own for their official name."""

    shape: tuple[int, int]
    fan_in: int

    @nn.compact
    def __call__(self) -> jax.Array:
        # PyTorch's kaiming_uniform(a=sqrt(5)) of each expert: uniform within 1/sqrt(fan_in).
        return self.param("weight", torch_bias(self.fan_in), self.shape)
