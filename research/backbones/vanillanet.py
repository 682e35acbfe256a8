"""VanillaNet: plain networks of 5 to 13 convolutions, trained with twice as many and merged afterwards.

Source: Chen et al. 2023 (arXiv 2305.12972) and the official code, whose layout and names this file follows. Two ideas
replace shortcuts and depth. Series activation (section 3.2): ReLU, then a wide depthwise convolution. Deep training
(section 3.1): every layer is two convolutions with a leaky ReLU between them, whose negative slope rises from 0 to 1
while training; at 1 it is the identity and `merge` makes the two convolutions one.

The slope is a variable of the network, `{"schedule": {"slope": a}}` beside `params` and `batch_stats`, so that one
compiled step serves all its values. It is no state: without it the slope is 1, as after training.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.depthwise import depthwise_conv
from research.layers.drop import Dropout
from research.layers.norm import BatchNorm
from research.layers.pool import adaptive_max_pool, global_mean, max_pool
from research.layers.remat import rematerialised

EPSILON = 1e-6
# The official initialiser cuts at 2, a hundred standard deviations, which cuts nothing.
_INIT = nn.initializers.normal(0.02)


def slope(step: jax.Array, *, steps_per_epoch: int, decay_epochs: float, curve: str = "linear") -> jax.Array:
    """Slope of the leaky ReLUs at a step (int, 0-based): from 0 to 1 in `decay_epochs`, constant within an epoch.

    Args:
      curve: "linear" (the published recipes) or "cosine", of epoch / decay_epochs.
    Raises:
      ValueError: another curve.
    """
    epoch = (jnp.asarray(step) // steps_per_epoch).astype(float)
    part = jnp.clip(epoch / decay_epochs, 0, 1) if decay_epochs else jnp.ones_like(epoch)
    if curve not in ("linear", "cosine"):
        raise ValueError(f"curve: {curve!r} is neither 'linear' nor 'cosine'")
    return part if curve == "linear" else (1 - jnp.cos(jnp.pi * part)) / 2


def _leaky(x: jax.Array, slope: jax.Array | None) -> jax.Array:
    return x if slope is None else jnp.where(x > 0, x, slope.astype(x.dtype) * x)


class SeriesActivation(nn.Module):
    """Batch-normalised weighted sum of the rectified neighbours: (B, H, W, C) -> (B, H, W, C).

    ReLU, then a depthwise convolution of side 2 * act_num + 1, then batch norm (train form) or a bias (deploy form):
    equation 5 of the paper. Negative values pass on to the next convolution.
    """

    act_num: int = 3
    deploy: bool = False
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        side, channels = 2 * self.act_num + 1, x.shape[-1]
        kernel = self.param("kernel", _INIT, (side, side, 1, channels)).astype(self.dtype)
        y = depthwise_conv(nn.relu(x).astype(self.dtype), kernel[:, :, 0], padding=self.act_num)
        if self.deploy:
            bias = self.param("bias", nn.initializers.zeros, (channels,))
            return y + bias.astype(y.dtype)[None, None, None]
        return BatchNorm(epsilon=EPSILON, group=self.bn_group, dtype=self.dtype, name="bn")(y, train)


class Block(nn.Module):
    """One stage: 1x1 convolution(s), pooling, series activation; (B, H, W, C) -> (B, H', W', features).

    Fields:
      stride: side and stride of the max pooling, 1 for none.
      ada_pool: side of an adaptive max pooling in its place, 0 for none.
      deploy: one convolution instead of two with a leaky ReLU between them.
    """

    features: int
    stride: int = 2
    ada_pool: int = 0
    act_num: int = 3
    deploy: bool = False
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, slope: jax.Array | None = None) -> jax.Array:
        conv = functools.partial(nn.Conv, kernel_size=(1, 1), kernel_init=_INIT, dtype=self.dtype)
        norm = functools.partial(BatchNorm, epsilon=EPSILON, group=self.bn_group, dtype=self.dtype)
        if self.deploy:
            x = conv(self.features, name="conv")(x)
        else:
            x = _leaky(norm(name="conv1_1")(conv(x.shape[-1], name="conv1_0")(x), train), slope)
            x = norm(name="conv2_1")(conv(self.features, name="conv2_0")(x), train)
        if self.stride > 1 and self.ada_pool:
            x = adaptive_max_pool(x, (self.ada_pool, self.ada_pool))
        elif self.stride > 1:
            if min(x.shape[1:3]) < self.stride:
                height, width = x.shape[1:3]
                raise ValueError(f"the image is too small: a {height}x{width} map is left to pool by {self.stride}")
            x = max_pool(x, self.stride, self.stride, 0)
        return SeriesActivation(self.act_num, self.deploy, self.bn_group, self.dtype, name="act")(x, train)


class VanillaNet(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in the official code:
      dims: channels of the stem and of every stage; strides: of every stage.
      act_num: reach of the series activation.
      ada_pool: side of each stage's adaptive pooling, 0 for none; given at all, the stem has stride 3 and padding 1.
      deploy: the merged form, of a third or half of the parameters; see `merge`.
      drop_rate: dropout before the classifier.
      bn_group: examples a batch-norm group, None for the global batch.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `block01`.. (every stage), `stage1`..  (the last map at each resolution, the stem's first),
    `pooled`. With `num_classes` 0 the logits are the pooled features.

    Raises:
      ValueError: `dims`, `strides` and `ada_pool` do not fit each other, or the image is too small.
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    act_num: int = 3
    ada_pool: tuple[int, ...] = ()
    num_classes: int = 1000
    deploy: bool = False
    drop_rate: float = 0.0
    bn_group: int | None = None
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        self._check(images)
        slope = self.get_variable("schedule", "slope") if self.has_variable("schedule", "slope") else None
        x = self._stem(images.astype(self.dtype), train, slope)
        endpoints, resolution = {"stem": x, "stage1": x}, 1
        block = rematerialised(Block, self.remat)
        pools = self.ada_pool or (0,) * len(self.strides)
        for index, (features, stride, side) in enumerate(zip(self.dims[1:], self.strides, pools, strict=True)):
            x = block(
                features=features,
                stride=stride,
                ada_pool=side,
                act_num=self.act_num,
                deploy=self.deploy,
                bn_group=self.bn_group,
                dtype=self.dtype,
                name=f"stages_{index}",
            )(x, train, slope)
            resolution += stride > 1
            endpoints |= {f"block{index + 1:02d}": x, f"stage{resolution}": x}

        pooled = endpoints["pooled"] = global_mean(x)
        if self.num_classes == 0:
            return pooled, endpoints
        return self._classifier(Dropout(self.drop_rate)(pooled, train), train, slope), endpoints

    def _norm(self, name: str) -> BatchNorm:
        return BatchNorm(epsilon=EPSILON, group=self.bn_group, dtype=self.dtype, name=name)

    def _stem(self, x: jax.Array, train: bool, slope: jax.Array | None) -> jax.Array:
        stride, pad = (3, 1) if self.ada_pool else (4, 0)
        conv = functools.partial(nn.Conv, self.dims[0], kernel_init=_INIT, dtype=self.dtype)
        patches = functools.partial(conv, kernel_size=(4, 4), strides=stride, padding=((pad, pad),) * 2)
        activation = functools.partial(SeriesActivation, self.act_num, self.deploy, self.bn_group, self.dtype)
        if self.deploy:
            return activation(name="stem_1")(patches(name="stem_0")(x), train)
        x = _leaky(self._norm("stem1_1")(patches(name="stem1_0")(x), train), slope)
        x = self._norm("stem2_1")(conv(kernel_size=(1, 1), name="stem2_0")(x), train)
        return activation(name="stem2_2")(x, train)

    def _classifier(self, x: jax.Array, train: bool, slope: jax.Array | None) -> jax.Array:
        dense = functools.partial(nn.Dense, self.num_classes, kernel_init=_INIT, dtype=self.dtype)
        if self.deploy:
            return dense(name="cls_2")(x)
        x = _leaky(self._norm("cls1_3")(dense(name="cls1_2")(x), train), slope)
        return dense(name="cls2_0")(x)

    def _check(self, images: jax.Array) -> None:
        if len(self.dims) != len(self.strides) + 1:
            raise ValueError(
                f"dims: {len(self.dims)} widths do not fit {len(self.strides)} strides: one more is needed"
            )
        if self.ada_pool and len(self.ada_pool) != len(self.strides):
            raise ValueError(f"ada_pool: {len(self.ada_pool)} sides do not fit {len(self.strides)} strides")
        if min(images.shape[1:3]) < 4:
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} are smaller than the stem's 4x4 patches")


def merge(variables) -> dict:
    """Variables of the deploy form that computes what the train form does at slope 1, up to rounding.

    A pure function of `{"params": ..., "batch_stats": ...}`, traceable and for any number of stages: every convolution
    absorbs its batch norm, then the two of a layer become their product (section 3.1, equations 1-3).

    Raises:
      ValueError: the variables are not those of the train form.
    """
    params, stats = variables["params"], variables.get("batch_stats", {})
    if "stem1_0" not in params:
        raise ValueError("merge wants the variables of the train form: these have no layer stem1_0")
    pair = lambda tree, own, first, second, norm: _product(
        _fused(tree[first], tree[norm[0]], own[norm[0]]),
        _fused(tree[second], tree[norm[1]], own[norm[1]]) if len(norm) > 1 else tree[second],
    )
    merged = {"stem_0": pair(params, stats, "stem1_0", "stem2_0", ("stem1_1", "stem2_1"))}
    merged["stem_1"] = _fused(params["stem2_2"], params["stem2_2"]["bn"], stats["stem2_2"]["bn"])
    for name in (name for name in params if name.startswith("stages_")):
        stage, own = params[name], stats[name]
        conv = pair(stage, own, "conv1_0", "conv2_0", ("conv1_1", "conv2_1"))
        merged[name] = {"conv": conv, "act": _fused(stage["act"], stage["act"]["bn"], own["act"]["bn"])}
    if "cls1_2" in params:
        merged["cls_2"] = pair(params, stats, "cls1_2", "cls2_0", ("cls1_3",))
    return {"params": merged}


def _fused(conv, norm, stats) -> dict:
    """A convolution and the batch norm after it as one; kernels (..., in, out), depthwise ones too."""
    scale = norm["scale"] / jnp.sqrt(stats["var"] + EPSILON)
    shift = conv["bias"] - stats["mean"] if "bias" in conv else -stats["mean"]
    spread = scale.reshape(*[1] * (conv["kernel"].ndim - 1), -1)
    return {"kernel": conv["kernel"] * spread, "bias": norm["bias"] + shift * scale}


def _product(first, second) -> dict:
    """A convolution followed by a 1x1 convolution (or two dense layers) as one."""
    mix = second["kernel"].reshape(second["kernel"].shape[-2:])
    times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return {"kernel": times(first["kernel"], mix), "bias": times(first["bias"], mix) + second["bias"]}


def build(**arguments) -> VanillaNet:
    """The module; see `VanillaNet` for the arguments."""
    return VanillaNet(**arguments)


def _variant(depth: int, width: int = 512, **arguments) -> dict:
    """The published sizes of `depth` convolutions, in units of `width` channels."""
    if depth < 7:
        multiples, strides = (1, 2, 4, 8, 8)[: depth - 1], (2, 2, 2, 1)[: depth - 2]
    elif depth == 7:
        multiples, strides = (1, 1, 2, 4, 8, 8), (1, 2, 2, 2, 1)
    else:
        deep = depth - 7  # further stages at the resolution of a sixteenth
        multiples, strides = (1, 1, 2, 4, *[4] * deep, 8, 8), (1, 2, 2, *[1] * deep, 2, 1)
    return {"dims": tuple(width * multiple for multiple in multiples), "strides": strides, **arguments}


_TRAIN = {
    **{f"vanillanet_{depth}": _variant(depth) for depth in range(5, 14)},
    "vanillanet_13_x1_5": _variant(13, 768),
    "vanillanet_13_x1_5_ada_pool": _variant(13, 768, ada_pool=(0, 38, 19, 0, 0, 0, 0, 0, 0, 10, 0)),
    # The backbone of the official detectors.
    "vanillanet_13_act4": _variant(13, act_num=4),
}
VARIANTS = {
    **_TRAIN,
    **{f"{name}_deploy": {**arguments, "deploy": True} for name, arguments in _TRAIN.items()},
}

NAMES = {
    "official": [
        (r"^stages_(\d+)", r"stages.\1"),
        (r"((?:^|\.)(?:stem|conv|cls)\d?)_(\d)\.", r"\1.\2."),
        (r"^(cls\.2|cls1\.2|cls2\.0)\.weight$", r"\1.weight", lambda shape: (*shape, 1, 1)),
    ]
}
