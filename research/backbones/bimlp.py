"""BiMLP: a vision MLP whose products, but for stem, down-sampling and classifier, have binary weights and activations.

Source: Xu et al. 2022 (arXiv 2212.14158). Arithmetic and names follow the official MindSpore file (`research/cv/BiMLP`
in mindspore-ai/models, commit eab643f5), which can only evaluate and differs from the paper in two ways: activations
are ternary, where the paper writes sign(), and depthwise kernels keep their values. `activation="sign"` is the paper's
network. The gradients are straight-through (see `research.layers.binary`), so the same module trains; `freeze` makes
the inference form of its weights.
"""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from research.layers import binary, drop
from research.layers.binary import BinaryConv, RPReLU, shifted
from research.layers.drop import DropPath
from research.layers.init import torch_bias, torch_linear
from research.layers.norm import BatchNorm, GroupNorm, accumulation_dtype
from research.layers.pool import global_mean
from research.layers.remat import rematerialised

_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
WINDOWS = (2, 3, 5, 7)  # of the max pools whose mean halves a map
HEIGHT, WIDTH = (1, 7), (7, 1)  # kernels of the branches that the official file calls h and w


def sample_norm(name: str, dtype: jnp.dtype) -> Callable:
    """A norm of each example by the mean and variance of its whole map, called as a batch norm: `norm(x, train)`."""
    norm = GroupNorm(1, dtype=dtype, name=name)
    return lambda x, train: norm(x)


def matched(x: jax.Array, features: int) -> jax.Array:
    """A shortcut between unequal widths, (..., C) -> (..., features): copies side by side, or means of neighbours.

    Raises:
      ValueError: neither width is a multiple of the other.
    """
    if features % x.shape[-1] == 0:
        return jnp.tile(x, (*[1] * (x.ndim - 1), features // x.shape[-1]))
    if x.shape[-1] % features:
        raise ValueError(f"no shortcut from {x.shape[-1]} to {features} channels: make widths multiples of 4")
    return jnp.mean(x.reshape(*x.shape[:-1], features, -1), axis=-1)


class Part(nn.Module):
    """What the binary parts of a network share.

    Fields:
      activation, weights: quantisers, see `research.layers.binary`.
      bn_group: examples a batch-norm group, None for the global batch.
    """

    activation: str = "ternary"
    weights: str = "xnor"
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    def shared(self) -> dict:
        """These fields, for a part of this part."""
        return {name: getattr(self, name) for name in ("activation", "weights", "bn_group", "dtype")}

    def conv(self, name: str, features: int, **options) -> BinaryConv:
        return BinaryConv(
            features, activation=self.activation, weights=self.weights, dtype=self.dtype, name=name, **options
        )

    def norm(self, name: str) -> BatchNorm:
        return BatchNorm(group=self.bn_group, dtype=self.dtype, name=name)

    def act(self, name: str) -> RPReLU:
        return RPReLU(dtype=self.dtype, name=name)

    def unit(self, x: jax.Array, names: tuple[str, str, str, str], train: bool, **options) -> jax.Array:
        """A shift, one binary layer with norm, the shortcut around it, RPReLU; `names` are those of the four."""
        shift, conv, norm, act = names
        x = shifted(self, shift, x)
        y = self.norm(norm)(self.conv(conv, x.shape[-1], **options)(x), train)
        return self.act(act)(y + x)


class Mlp(Part):
    """Two binary layers over channels with a shortcut around each: (..., C) -> (..., features).

    Fields:
      hidden, features: widths, multiples or fractions of one another.
    """

    hidden: int = 0
    features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shortcut = self.act("act1")(self.norm("norm0")(matched(x, self.hidden), train))
        y = self.conv("fc1", self.hidden)(shifted(self, "move1", x))
        x = self.act("act2")(self.norm("norm1")(y, train) + shortcut)
        y = self.conv("fc2", self.features)(shifted(self, "move2", x))
        return self.act("act3")(self.norm("norm2")(y, train) + matched(x, self.features))


class Mixing(Part):
    """Phase-aware token mixing with binary layers, the official `PATM`: (B, H, W, C) -> (B, H, W, C).

    Three branches, along the height, along the width and over channels alone, are summed with weights that depend on
    the image.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        along = [self._wave(x, axis, kernel, train) for axis, kernel in (("h", HEIGHT), ("w", WIDTH))]
        branches = [*along, self.unit(x, ("move_fcc", "fc_c", "norm_c", "act_c"), train)]
        channels = x.shape[-1]
        pooled = jnp.mean(sum(branches) + x, axis=(1, 2), keepdims=True)
        weights = Mlp(hidden=channels // 4, features=3 * channels, name="reweight", **self.shared())(pooled, train)
        # Three neighbouring outputs belong to one channel.
        weights = weights.reshape(-1, 1, 1, channels, 3).astype(accumulation_dtype(x))
        weights = jax.nn.softmax(weights, axis=-1).astype(self.dtype)
        x = sum(branch * weights[..., i] for i, branch in enumerate(branches)) + x
        return self.unit(x, ("move_proj", "proj", "norm_proj", "act_proj"), train)

    def _wave(self, x: jax.Array, axis: str, kernel: tuple[int, int], train: bool) -> jax.Array:
        """Amplitude and phase of every position as real and imaginary part, mixed along one axis of the map."""
        theta_names = (f"move_theta{axis}", f"theta_{axis}_conv", f"theta_{axis}_bn", f"theta_{axis}_act")
        theta = self.unit(x, theta_names, train).astype(accumulation_dtype(x))
        amplitude = self.unit(x, (f"move_fc{axis}", f"fc_{axis}", f"fc_{axis}_bn", f"fc_{axis}_act"), train)
        parts = [amplitude * function(theta).astype(self.dtype) for function in (jnp.cos, jnp.sin)]
        wave = shifted(self, f"move_tfc{axis}", jnp.concatenate(parts, axis=-1))
        # Group j holds channels 2j and 2j+1 of the concatenation: neighbours of one part, not a cosine and its sine.
        y = self.conv(f"tfc_{axis}", x.shape[-1], kernel_size=kernel, groups=x.shape[-1])(wave)
        return self.act(f"act_{axis}")(self.norm(f"norm_{axis}")(y, train) + matched(wave, x.shape[-1]))


class Block(Part):
    """The two multi-branch blocks, token mixing and channel mixing, each added to its input: (B, H, W, C) -> the same.

    Fields:
      norm_layer: called as `norm_layer(name=...)(x, train)`, the norm before each of the two.
    """

    norm_layer: Callable = BatchNorm
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        y = Mixing(name="attn", **self.shared())(self.norm_layer(name="norm1")(x, train), train)
        x = x + DropPath(self.drop_path)(y, train)
        y = self.norm_layer(name="norm2")(x, train)
        depthwise = functools.partial(self.unit, y, train=train, groups=channels)
        height = depthwise(("move_h", "sfc_h", "norm_h", "act1"), kernel_size=HEIGHT)
        width = depthwise(("move_w", "sfc_w", "norm_w", "act2"), kernel_size=WIDTH)
        mixed = Mlp(hidden=4 * channels, features=channels, name="mlp", **self.shared())(y, train)
        weight = self.param("weight", nn.initializers.zeros, (2,)).astype(self.dtype)
        y = weight[0] * height + weight[1] * width + (1 - weight[0] - weight[1]) * mixed
        return x + DropPath(self.drop_path)(y, train)


def halved(x: jax.Array) -> jax.Array:
    """The mean of four max pools of stride 2, (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C).

    Windows are `WINDOWS` wide; what they stick out by is shared between both sides, the odd pixel at the end
    (MindSpore's and TensorFlow's `same`), and never wins.
    """
    pools = [nn.max_pool(x, (window, window), (2, 2), padding="SAME") for window in WINDOWS]
    return sum(pools) / 4


class Projection(nn.Module):
    """A real-valued convolution with norm and RPReLU: (B, H, W, C) -> (B, H / stride, W / stride, features).

    Fields:
      norm_layer: called as `norm_layer(name=...)(x, train)`.
      halve: whether the four max pools follow, see `halved`.
    """

    features: int
    norm_layer: Callable
    kernel_size: int = 1
    stride: int = 1
    padding: int = 0
    halve: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(
            self.features,
            (self.kernel_size,) * 2,
            (self.stride,) * 2,
            padding=((self.padding, self.padding),) * 2,
            kernel_init=_INIT,
            bias_init=torch_bias(self.kernel_size**2 * x.shape[-1]),
            dtype=self.dtype,
            name="proj",
        )(x)
        x = RPReLU(dtype=self.dtype, name="act")(self.norm_layer(name="norm")(x, train))
        return halved(x) if self.halve else x


class BiMLP(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields:
      layers, embed_dims: blocks and channels (multiples of 4) of each stage; stage 1 works at a quarter of the image's
        side, each further one at half of the side before.
      norm_layer: `batch`, or `sample` (group norm with one group), for the norms outside the binary parts.
      activation: `ternary` (official), `sign` (the paper), `bireal`, `relu` or `real`; weights: `xnor` or `real`. Both
        steps of two-step training, and a real-valued twin of the network, are settings of these.
      drop_path: largest rate of stochastic depth, growing with depth.
      bn_group: examples a batch-norm group, None for the global batch.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `stage1`.., `features` (after the final norm), `pooled`. With `num_classes` 0 the logits are the
    pooled features.

    Raises:
      ValueError: images with a side below 3 pixels.
    """

    layers: tuple[int, ...] = (2, 2, 4, 2)
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    norm_layer: str = "batch"
    activation: str = "ternary"
    weights: str = "xnor"
    num_classes: int = 1000
    drop_path: float = 0.0
    bn_group: int | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        height, width = images.shape[1:3]
        if min(height, width) < 3:
            raise ValueError(f"images of {height}x{width} are smaller than 3x3, the least that the stem takes")
        norms = {
            "batch": functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype),
            "sample": functools.partial(sample_norm, dtype=self.dtype),
        }
        norm = norms[self.norm_layer]
        x = Projection(self.embed_dims[0], norm, 7, 4, 2, dtype=self.dtype, name="patch_embed")(
            images.astype(self.dtype), train
        )
        endpoints = {"stem": x}
        block = rematerialised(Block, self.remat)
        rates = iter(drop.rates(self.drop_path, sum(self.layers)))
        for stage, (depth, features) in enumerate(zip(self.layers, self.embed_dims, strict=True)):
            if stage:
                x = Projection(features, norm, halve=True, dtype=self.dtype, name=f"network_{2 * stage - 1}")(x, train)
            for index in range(depth):
                x = block(
                    norm_layer=norm,
                    drop_path=next(rates),
                    activation=self.activation,
                    weights=self.weights,
                    bn_group=self.bn_group,
                    dtype=self.dtype,
                    name=f"network_{2 * stage}_{index}",
                )(x, train)
            endpoints[f"stage{stage + 1}"] = x

        x = endpoints["features"] = norm(name="norm")(x, train)
        pooled = endpoints["pooled"] = global_mean(x)
        if self.num_classes == 0:
            return pooled, endpoints
        return torch_linear(self.num_classes, pooled.shape[-1], dtype=self.dtype, name="head")(pooled), endpoints


def build(**arguments) -> BiMLP:
    """The module; see `BiMLP` for the arguments.

    Raises:
      ValueError: widths that are no multiples of 4, an unknown norm or quantiser.
    """
    model = BiMLP(**arguments)
    choices = {
        "norm_layer": ("batch", "sample"),
        "activation": binary.ACTIVATIONS,
        "weights": binary.WEIGHTS,
    }
    for field, known in choices.items():
        if getattr(model, field) not in known:
            raise ValueError(f"{field}: {getattr(model, field)!r} is none of {', '.join(known)}")
    if wrong := [width for width in model.embed_dims if width % 4]:
        raise ValueError(f"embed_dims: {wrong[0]} is no multiple of 4, as the shortcuts of the gates need")
    return model


def freeze(params) -> dict:
    """The inference form of trained parameters: latent kernels of binary layers are replaced by their quantised values.

    The network computes the same from both (a scale is then a mean of equal numbers). What is stored with one bit a
    weight is made by `research.backbones.bimlp_packed`, from either.
    """
    flat = traverse_util.flatten_dict(dict(params))
    return traverse_util.unflatten_dict({p: binary.xnor(x) if is_binary(p) else x for p, x in flat.items()})


def is_binary(path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` is the kernel of a binary layer."""
    return bool(re.match(r"network_\d+_\d+$", path[0])) and path[-1] == "kernel"


VARIANTS = {
    "bimlp_s": {"layers": (2, 2, 4, 2)},
    "bimlp_m": {"layers": (2, 3, 10, 3), "norm_layer": "sample"},
}


def _vector(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape, 1, 1)


_NORM = r"(^|\.)(norm\w*|\w+_bn)"
NAMES = {
    # MindSpore's names.
    "official": [
        (r"^network_(\d+)_(\d+)", r"network.\1.\2"),
        (r"^network_(\d+)\.", r"network.\1."),
        (rf"{_NORM}\.weight$", r"\1\2.gamma"),
        (rf"{_NORM}\.bias$", r"\1\2.beta"),
        (r"\.running_mean$", ".moving_mean"),
        (r"\.running_var$", ".moving_variance"),
        (r"(^|\.)(move\w+)$", r"\1\2.bias", _vector),
        (r"(^|\.)w$", r"\1act.w", _vector),
    ]
}
