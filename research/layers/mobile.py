"""What mobile networks are made of: rounded widths, squeeze-excite, separable and inverted residual blocks.

Sources: Howard et al. 2017 (depthwise-separable convolutions, arXiv 1704.04861), Sandler et al. 2018 (inverted
residuals, arXiv 1801.04381), Hu et al. 2018 (squeeze-excite, arXiv 1709.01507), Howard et al. 2019 (MobileNetV3, arXiv
1905.02244). Names of parameters are timm's.

Stages of blocks are written in timm's notation, such as `ir_r2_k5_s2_e3_c40_se0.25_nre`; see `Row`.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers import depthwise as shifted
from research.layers.drop import DropPath
from research.layers.init import kaiming_fan_out
from research.layers.norm import BatchNorm
from research.layers.patch_embed import pair
from research.layers.remat import rematerialised

ACTIVATIONS = {"relu": nn.relu, "relu6": nn.relu6, "hard_swish": nn.hard_swish, "silu": nn.silu}
_CODES = {"re": "relu", "r6": "relu6", "hs": "hard_swish", "sw": "silu"}

# Kaiming normal, fan-out, counts the outputs of one group: a 3x3 depthwise kernel has nine.
depthwise_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def classifier_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Uniform within 1/sqrt(classes): timm's initialiser of EfficientNets takes the classes for the fan-in."""
    return jax.random.uniform(key, shape, dtype, -(shape[-1] ** -0.5), shape[-1] ** -0.5)


def round_width(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor` that is at least `divisor` and at least 90 % of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def conv(features: int, size: int | tuple[int, int], stride: int = 1, *, same: bool = False, **kwargs) -> nn.Conv:
    """A convolution without bias, padded symmetrically as PyTorch pads, or with `same` as TensorFlow pads.

    TensorFlow's SAME puts the odd pixel of padding at the end, and pads no more than the stride needs.
    """
    padding = "SAME" if same else tuple(((side - 1) // 2,) * 2 for side in pair(size))
    options = {"kernel_init": kaiming_fan_out, "padding": padding, "use_bias": False, **kwargs}
    return nn.Conv(features, pair(size), (stride, stride), **options)


def depthwise(channels: int, size: int | tuple[int, int], stride: int = 1, **kwargs) -> nn.Conv:
    """A `conv` of every channel by itself."""
    own = {"feature_group_count": channels, "conv_general_dilated": shifted.conv}
    return conv(channels, size, stride, **{"kernel_init": depthwise_init, **kwargs, **own})


class SqueezeExcite(nn.Module):
    """Channels weighted by a two-layer perceptron of their means: (B, H, W, C) -> (B, H, W, C).

    Fields:
      width: hidden width.
      act: after the first layer; `gate`: after the second, with values in [0, 1].
    """

    width: int
    act: Callable = nn.relu
    gate: Callable = nn.sigmoid
    kernel_init: Callable = kaiming_fan_out
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = functools.partial(nn.Conv, kernel_size=(1, 1), kernel_init=self.kernel_init, dtype=self.dtype)
        y = self.act(layer(self.width, name="conv_reduce")(jnp.mean(x, axis=(1, 2), keepdims=True)))
        return x * self.gate(layer(x.shape[-1], name="conv_expand")(y))


class Row(NamedTuple):
    """Equal blocks in a row, of which the first has the stride.

    Fields, with their letters in timm's notation:
      kind: `ds` (depthwise-separable), `ir` (inverted residual) or `cn` (one convolution).
      repeats (r), kernel (k), stride (s), channels (c); expand (e): width of an `ir` block over its input's.
      squeeze (se): width of the squeeze-excite over that of the block, 0 for none.
      act (n): key of `ACTIVATIONS` in place of the network's.
      skip: False (`noskip`) leaves the residual connection out.
    """

    kind: str
    repeats: int = 1
    kernel: int = 3
    stride: int = 1
    expand: float = 1.0
    channels: int = 16
    squeeze: float = 0.0
    act: str | None = None
    skip: bool = True


_FIELDS = {"r": "repeats", "k": "kernel", "s": "stride", "e": "expand", "c": "channels", "se": "squeeze"}


def row(text: str) -> Row:
    """The `Row` that timm writes as `text`.

    Raises:
      ValueError: a kind of block or an option there is not.
    """
    kind, *options = text.split("_")
    values = {}
    for option in options:
        number = re.fullmatch(r"(r|k|s|e|c|se)(\d+(?:\.\d+)?)", option)
        if number:
            name = _FIELDS[number[1]]
            values[name] = float(number[2]) if name in ("expand", "squeeze") else int(number[2])
        elif option.startswith("n") and option[1:] in _CODES:
            values["act"] = _CODES[option[1:]]
        elif option == "noskip":
            values["skip"] = False
        else:
            raise ValueError(
                f"{text!r}: no option {option!r}; there are {', '.join(_FIELDS)} with a number, and noskip"
            )
    if kind not in ("ds", "ir", "cn"):
        raise ValueError(f"{text!r}: {kind!r} is none of ds, ir, cn")
    return Row(kind, **values)


def checked(stages: Sequence[Sequence[str]], act: str, pad_type: str) -> None:
    """Raises a ValueError where a network's blocks, activation or padding are not to be had."""
    for text in (text for rows in stages for text in rows):
        row(text)
    if act not in ACTIVATIONS:
        raise ValueError(f"act: {act!r} is none of {', '.join(ACTIVATIONS)}")
    if pad_type not in ("", "same"):
        raise ValueError(f"pad_type: {pad_type!r} is neither '' nor 'same'")


class Block(nn.Module):
    """One block of a `Row`: (B, H, W, C) -> (B, H/stride, W/stride, features).

    Fields:
      row: what it is; its `channels` and `repeats` are not used.
      act: key of `ACTIVATIONS`.
      hard_squeeze: squeeze-excite as in MobileNetV3: relative to the expanded width, rounded to a multiple of 8, with
        ReLU and a hard sigmoid. Otherwise as in EfficientNet: relative to the input's width, rounded plainly, with the
        block's activation and a sigmoid.
      same: padding as TensorFlow's.
      epsilon: of the batch norms.
    """

    row: Row
    features: int
    stride: int = 1
    act: str = "relu"
    hard_squeeze: bool = False
    same: bool = False
    epsilon: float = 1e-5
    drop_path: float = 0.0
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(BatchNorm, epsilon=self.epsilon, group=self.bn_group, dtype=self.dtype)
        options = {"same": self.same, "dtype": self.dtype}
        act = ACTIVATIONS[self.row.act or self.act]
        if self.row.kind == "cn":
            y = conv(self.features, self.row.kernel, self.stride, name="conv", **options)(x)
            return act(norm(name="bn1")(y, train))

        expanded, y, width = self.row.kind == "ir", x, x.shape[-1]
        if expanded:
            width = round_width(self.row.expand * width)
            y = act(norm(name="bn1")(conv(width, 1, name="conv_pw", **options)(y), train))
        y = depthwise(width, self.row.kernel, self.stride, name="conv_dw", **options)(y)
        y = act(norm(name="bn2" if expanded else "bn1")(y, train))
        if self.row.squeeze:
            y = self._squeeze(y, act)
        y = conv(self.features, 1, name="conv_pwl" if expanded else "conv_pw", **options)(y)
        y = norm(name="bn3" if expanded else "bn2")(y, train)
        if not self.row.skip or self.stride > 1 or x.shape[-1] != self.features:
            return y
        return x + DropPath(self.drop_path)(y, train)

    def _squeeze(self, y: jax.Array, act: Callable) -> jax.Array:
        width, ratio = y.shape[-1], self.row.squeeze
        if self.hard_squeeze:
            squeeze = SqueezeExcite(round_width(ratio * width), nn.relu, nn.hard_sigmoid, dtype=self.dtype, name="se")
        else:
            expand = self.row.expand if self.row.kind == "ir" else 1.0
            squeeze = SqueezeExcite(round(width * (ratio / expand)), act, dtype=self.dtype, name="se")
        return squeeze(y)


def trunk(
    images: jax.Array,
    train: bool,
    stages: Sequence[Sequence[Row]],
    *,
    stem: int,
    width: float = 1.0,
    act: str = "relu",
    drop_path: float = 0.0,
    remat: bool | str = False,
    **options,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Stem and blocks, as modules `conv_stem`, `bn1`, `blocks_S_B` of the module that calls this in its `__call__`.

    Args:
      images: (B, H, W, 3).
      stages: rows of blocks, of which only the first may have a stride; `width` multiplies their channels.
      stem: channels of the first convolution, which halves the resolution.
      drop_path: largest rate of stochastic depth; as in timm the last block falls short of it by one step.
      **options: fields of `Block`.
    Returns:
      (the last map, endpoints): `stem`, and `stage1`.. at each resolution from a quarter on, the last map that is not
      made by a single convolution (`cn`).
    """
    dtype = options["dtype"]
    norm = BatchNorm(epsilon=options["epsilon"], group=options["bn_group"], dtype=dtype, name="bn1")
    x = conv(stem, 3, 2, same=options["same"], dtype=dtype, name="conv_stem")(images.astype(dtype))
    x = ACTIVATIONS[act](norm(x, train))
    endpoints, halvings, index = {"stem": x}, 0, 0

    block, count = rematerialised(Block, remat), sum(r.repeats for rows in stages for r in rows)
    for stage, rows in enumerate(stages):
        for position, kind in enumerate(each for each in rows for _ in range(each.repeats)):
            stride = kind.stride if position == 0 else 1
            halvings += stride == 2
            x = block(
                row=kind,
                features=round_width(kind.channels * width),
                stride=stride,
                act=act,
                drop_path=drop_path * index / count,
                name=f"blocks_{stage}_{position}",
                **options,
            )(x, train)
            index += 1
        if halvings and rows[-1].kind != "cn":
            endpoints[f"stage{halvings}"] = x
    return x, endpoints
