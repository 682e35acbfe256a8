"""ParameterNet: a GhostNet whose convolutions have several experts each, many parameters at few multiply-adds.

Source: Han et al. 2024 (arXiv 2306.14525) and the official code, whose arguments and names this file follows. With
`num_experts` 0 the convolutions are plain and the network is the static GhostNet that the paper compares with. The
table of the 300M size is nowhere stated; it is GhostNet's own at 1.45 times the width, which gives the paper's
parameters and FLOPs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core import cost
from research.layers import depthwise, drop
from research.layers.drop import Dropout
from research.layers.dynamic import DynamicConv
from research.layers.init import torch_linear
from research.layers.mlp import gelu
from research.layers.mobile import ACTIVATIONS, SqueezeExcite, round_width
from research.layers.norm import BatchNorm
from research.layers.patch_embed import torch_conv
from research.layers.pool import global_mean
from research.layers.remat import rematerialised

ACTS = {**ACTIVATIONS, "gelu": gelu}
# Rows of blocks (kernel, expanded channels, channels, squeeze-excite ratio, stride), before the width factor.
CFGS_600M = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((3, 120, 40, 0.25, 1),) * 2,
    ((3, 240, 80, 0, 2),),
    (*((3, 200, 80, 0, 1),) * 3, (3, 480, 112, 0.25, 1), *((3, 672, 112, 0.25, 1),) * 2),
    ((5, 672, 160, 0.25, 2),),
    ((3, 960, 160, 0.25, 1),) * 5,
)
CFGS_300M = (
    *CFGS_600M[:4],
    ((5, 120, 40, 0.25, 1),),
    CFGS_600M[5],
    ((3, 200, 80, 0, 1), *((3, 184, 80, 0, 1),) * 2, (3, 480, 112, 0.25, 1), (3, 672, 112, 0.25, 1)),
    CFGS_600M[7],
    ((5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)) * 2,
)


def _conv(features: int, size: int, stride: int = 1, *, groups: int = 1, experts: int, dtype, name: str) -> nn.Module:
    """A convolution with that many experts, or a plain one; without bias, padded symmetrically."""
    if experts:
        options = {"groups": groups, "num_experts": experts, "dtype": dtype, "name": name}
        return DynamicConv(features, size, stride, **options)
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=(((size - 1) // 2,) * 2,) * 2,
        use_bias=False,
        feature_group_count=groups,
        kernel_init=torch_conv,
        conv_general_dilated=depthwise.conv,
        dtype=dtype,
        name=name,
    )


class GhostModule(nn.Module):
    """Half of the channels from a 1x1 convolution, the others from a depthwise 3x3 of these; then cut to `features`.

    (B, H, W, C) -> (B, H, W, features). `act` follows both halves, None for nothing.
    """

    features: int
    act: str | None = "hard_swish"
    num_experts: int = 4
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        half, halves = math.ceil(self.features / 2), []
        act = ACTS[self.act] if self.act else lambda y: y
        for name, size, groups in (("primary_conv", 1, 1), ("cheap_operation", 3, half)):
            options = {"groups": groups, "experts": self.num_experts, "dtype": self.dtype}
            x = _conv(half, size, name=f"{name}_0", **options)(x)
            x = act(BatchNorm(group=self.bn_group, dtype=self.dtype, name=f"{name}_1")(x, train))
            halves.append(x)
        return jnp.concatenate(halves, axis=-1)[..., : self.features]


class Block(nn.Module):
    """Ghost bottleneck: (B, H, W, C) -> (B, H/stride, W/stride, features), without activation after the sum.

    Fields:
      mid: channels between the two ghost modules.
      kernel: side of the depthwise convolutions, which are there with a stride (always plain) and in a shortcut.
      se_ratio: width of the squeeze-excite over `mid`, 0 for none.
    """

    features: int
    mid: int
    kernel: int = 3
    stride: int = 1
    se_ratio: float = 0.0
    act: str = "hard_swish"
    num_experts: int = 4
    drop_path: float = 0.0
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        ghost = functools.partial(GhostModule, num_experts=self.num_experts, bn_group=self.bn_group, dtype=self.dtype)
        conv = functools.partial(_conv, experts=self.num_experts, dtype=self.dtype)
        y = ghost(self.mid, self.act, name="ghost1")(x, train)
        if self.stride > 1:
            options = {"groups": self.mid, "experts": 0, "dtype": self.dtype, "name": "conv_dw"}
            y = norm(name="bn_dw")(_conv(self.mid, self.kernel, self.stride, **options)(y), train)
        if self.se_ratio:
            act = nn.relu if self.act == "gelu" else ACTS[self.act]
            options = {"gate": nn.hard_sigmoid, "kernel_init": torch_conv, "dtype": self.dtype, "name": "se"}
            y = SqueezeExcite(round_width(self.mid * self.se_ratio, 4), act, **options)(y)
        y = drop.DropPath(self.drop_path)(ghost(self.features, None, name="ghost2")(y, train), train)
        if self.stride == 1 and x.shape[-1] == self.features:
            return x + y
        x = conv(x.shape[-1], self.kernel, self.stride, groups=x.shape[-1], name="shortcut_0")(x)
        x = conv(self.features, 1, name="shortcut_2")(norm(name="shortcut_1")(x, train))
        return norm(name="shortcut_3")(x, train) + y


class ParameterNet(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in the official code:
      cfgs: rows of blocks, see `CFGS_600M`; width: factor on all channels but the head's, rounded to multiples of 4.
      act: `hard_swish`, `relu`, `relu6`, `silu` or `gelu`.
      num_experts: experts of every convolution but the strided depthwise ones, squeeze-excites and head; 0: plain.
      head: width before the classifier.
      drop_rate: dropout before the classifier; drop_path: largest rate of stochastic depth, equal within a row.
      bn_group: examples a batch-norm group, None for the global batch.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `block01`.. (every row), `stage1`.. (the last row at each resolution from a quarter on),
    `features` (the last convolution's map), `pooled`, what the classifier sees. With `num_classes` 0 the logits are
    `pooled`.

    Raises:
      ValueError: an unknown `act`.
    """

    cfgs: tuple = CFGS_600M
    width: float = 1.0
    act: str = "hard_swish"
    num_experts: int = 4
    head: int = 1280
    num_classes: int = 1000
    drop_rate: float = 0.2
    drop_path: float = 0.0
    bn_group: int | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        if self.act not in ACTS:
            raise ValueError(f"act: {self.act!r} is none of {', '.join(ACTS)}")
        act, scaled = ACTS[self.act], lambda channels: round_width(channels * self.width, 4)
        norm = functools.partial(BatchNorm, group=self.bn_group, dtype=self.dtype)
        conv = functools.partial(_conv, experts=self.num_experts, dtype=self.dtype)
        x = conv(scaled(16), 3, 2, name="conv_stem")(images.astype(self.dtype))
        x = act(norm(name="bn1")(x, train))
        endpoints, halvings = {"stem": x}, 0

        block = rematerialised(Block, self.remat)
        for row, (cfg, rate) in enumerate(zip(self.cfgs, drop.rates(self.drop_path, len(self.cfgs)), strict=True)):
            for index, (kernel, mid, features, se_ratio, stride) in enumerate(cfg):
                halvings += stride > 1
                x = block(
                    features=scaled(features),
                    mid=scaled(mid),
                    kernel=kernel,
                    stride=stride,
                    se_ratio=se_ratio,
                    act=self.act,
                    num_experts=self.num_experts,
                    drop_path=rate,
                    bn_group=self.bn_group,
                    dtype=self.dtype,
                    name=f"blocks_{row}_{index}",
                )(x, train)
            endpoints |= {f"block{row + 1:02d}": x} | ({f"stage{halvings}": x} if halvings else {})

        last = f"blocks_{len(self.cfgs)}_0"
        x = conv(scaled(self.cfgs[-1][-1][1]), 1, name=f"{last}_conv")(x)
        x = endpoints["features"] = act(norm(name=f"{last}_bn1")(x, train))
        x = torch_linear(self.head, x.shape[-1], dtype=self.dtype, name="conv_head")(global_mean(x))
        pooled = endpoints["pooled"] = act(x)
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        return torch_linear(self.num_classes, self.head, dtype=self.dtype, name="classifier")(x), endpoints


def paper_flops(model: ParameterNet, size: int = 224) -> dict[str, int]:
    """Costs of one image: `params`, `macs`, and `flops` as the paper states them.

    These count multiply-adds and, beside them, every number that the means of routings and classifier read.
    """
    read, found = [], {}

    def watch(call, args, kwargs, context):
        if isinstance(context.module, DynamicConv) and context.method_name == "__call__":
            read.append(math.prod(args[0].shape))
        return call(*args, **kwargs)

    def forward(image):
        with nn.intercept_methods(watch):
            (logits, endpoints), variables = model.init_with_output(jax.random.key(0), image)
        found["params"] = cost.params_count(variables["params"])
        read.append(math.prod(endpoints["features"].shape))
        return logits

    macs = cost.macs(forward, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return {**found, "macs": macs, "flops": macs + sum(read)}


def build(**arguments) -> ParameterNet:
    """The module; see `ParameterNet` for the arguments."""
    return ParameterNet(**arguments)


_SIZES = {"300m": {"cfgs": CFGS_300M, "width": 1.45}, "600m": {"cfgs": CFGS_600M, "width": 1.9}}
VARIANTS = {
    **{f"parameternet_{size}": arguments for size, arguments in _SIZES.items()},
    **{
        f"parameternet_{size}_experts{count}": {**arguments, "num_experts": count}
        for size, arguments in _SIZES.items()
        for count in (1, 2, 8)
    },
    **{f"ghostnet_{size}": {**arguments, "num_experts": 0} for size, arguments in _SIZES.items()},
}

NAMES = {
    "official": [
        (r"^blocks_(\d+)_(\d+)_?", r"blocks.\1.\2."),
        (r"^(blocks\.\d+\.\d+)\.\.", r"\1."),
        (r"(primary_conv|cheap_operation|shortcut)_(\d)", r"\1.\2"),
        (r"^conv_head\.weight$", "conv_head.weight", lambda shape: (*shape, 1, 1)),
    ]
}
