"""ConvNeXt and ConvNeXt V2.

Sources: Liu et al. 2022 (arXiv 2201.03545), Woo et al. 2023 (arXiv 2301.00808). Arguments and the first dialect of
names are timm's; the second dialect is the authors' own, also used by VanillaKD.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import Input
from research.layers import depthwise, drop
from research.layers.dense import Dense
from research.layers.drop import Dropout
from research.layers.mlp import gelu
from research.layers.norm import GRN, LayerNorm
from research.layers.pool import global_mean
from research.layers.remat import rematerialised

# The papers truncate at 100 standard deviations, which truncates nothing.
_INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Residual block (B, H, W, C) -> (B, H, W, C): depthwise convolution, LN, expansion by 4, GELU, (GRN), projection.

    Fields:
      scale_init: initial value of the layer scale `gamma`; None for no layer scale.
      use_grn: global response normalisation after the activation (V2).
      conv_mlp: the two dense layers are 1x1 convolutions, which changes the shapes of their weights only.
    """

    features: int
    kernel_size: int = 7
    scale_init: float | None = 1e-6
    use_grn: bool = False
    conv_mlp: bool = False
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        pad = self.kernel_size // 2
        y = nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            padding=((pad, pad), (pad, pad)),
            feature_group_count=self.features,
            kernel_init=_INIT,
            dtype=self.dtype,
            conv_general_dilated=depthwise.conv,
            name="conv_dw",
        )(x)
        y = LayerNorm(dtype=self.dtype, name="norm")(y)
        y = gelu(self._dense(4 * self.features, "mlp_fc1")(y))
        y = GRN(dtype=self.dtype, name="mlp_grn")(y) if self.use_grn else y
        y = self._dense(self.features, "mlp_fc2")(y)
        if self.scale_init is not None:
            gamma = self.param("gamma", nn.initializers.constant(self.scale_init), (self.features,))
            y = y * gamma.astype(y.dtype)[None, None, None]
        return x + drop.DropPath(self.drop_path)(y, train)

    def _dense(self, features: int, name: str) -> nn.Module:
        kwargs = {"kernel_init": _INIT, "dtype": self.dtype, "name": name}
        return nn.Conv(features, (1, 1), **kwargs) if self.conv_mlp else Dense(features, **kwargs)


class ConvNeXt(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm:
      depths, dims, kernel_sizes: blocks, channels and depthwise kernel (one for all, or one each) of the four stages.
      ls_init_value: initial layer scale, None without; use_grn: V2; conv_mlp: see `Block`.
      stem_type: `patch` (one convolution of `patch_size` without overlap), `overlap`, `overlap_tiered`, `overlap_act`
        (two 3x3 convolutions of stride 2).
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      remat: see `research.layers.remat`.

    Endpoints: `stem`, `stage1`..`stage4` and `pooled`, the normalised mean the classifier sees. With `num_classes` 0
    the logits are `pooled`.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_sizes: int | tuple[int, ...] = 7
    num_classes: int = 1000
    ls_init_value: float | None = 1e-6
    stem_type: str = "patch"
    patch_size: int = 4
    conv_mlp: bool = False
    use_grn: bool = False
    drop_rate: float = 0.0
    drop_path: float = 0.0
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = self._stem(images.astype(self.dtype))
        endpoints = {"stem": x}
        block = rematerialised(Block, self.remat)
        rates = iter(drop.rates(self.drop_path, sum(self.depths)))
        sizes = (self.kernel_sizes,) * len(self.dims) if isinstance(self.kernel_sizes, int) else self.kernel_sizes
        halves_first = self.stem_type == "patch" and self.patch_size == 2
        for stage, (depth, features, size) in enumerate(zip(self.depths, self.dims, sizes, strict=True)):
            if stage > 0 or halves_first:
                x = LayerNorm(dtype=self.dtype, name=f"stages_{stage}_downsample_0")(x)
                x = self._patches(features, 2, f"stages_{stage}_downsample_1")(x)
            for index in range(depth):
                x = block(
                    features=features,
                    kernel_size=size,
                    scale_init=self.ls_init_value,
                    use_grn=self.use_grn,
                    conv_mlp=self.conv_mlp,
                    drop_path=next(rates),
                    dtype=self.dtype,
                    name=f"stages_{stage}_blocks_{index}",
                )(x, train)
            endpoints[f"stage{stage + 1}"] = x

        pooled = endpoints["pooled"] = LayerNorm(dtype=self.dtype, name="head_norm")(global_mean(x))
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        return nn.Dense(self.num_classes, kernel_init=_INIT, dtype=self.dtype, name="head_fc")(x), endpoints

    def _patches(self, features: int, size: int, name: str) -> nn.Conv:
        kwargs = {"padding": "VALID", "kernel_init": _INIT, "dtype": self.dtype}
        return nn.Conv(features, (size, size), (size, size), name=name, **kwargs)

    def _stem(self, x: jax.Array) -> jax.Array:
        first = self.dims[0]
        if self.stem_type == "patch":
            x = self._patches(first, self.patch_size, "stem_0")(x)
            return LayerNorm(dtype=self.dtype, name="stem_1")(x)
        if self.stem_type not in ("overlap", "overlap_tiered", "overlap_act"):
            known = "'patch', 'overlap', 'overlap_tiered', 'overlap_act'"
            raise ValueError(f"stem_type: {self.stem_type!r} is none of {known}")
        half = functools.partial(
            nn.Conv, kernel_size=(3, 3), strides=2, padding=((1, 1), (1, 1)), kernel_init=_INIT, dtype=self.dtype
        )
        # Official names count the activation as a layer.
        activated = int(self.stem_type == "overlap_act")
        x = half(_tier(first) if self.stem_type == "overlap_tiered" else first, name="stem_0")(x)
        x = gelu(x) if activated else x
        x = half(first, name=f"stem_{1 + activated}")(x)
        return LayerNorm(dtype=self.dtype, name=f"stem_{2 + activated}")(x)


def _tier(features: int) -> int:
    """Half of `features`, rounded to a multiple of 8 and not below 90 % of the half."""
    half = features // 2
    rounded = max(8, (half + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * half else rounded


def build(**arguments) -> ConvNeXt:
    """The module; see `ConvNeXt` for the arguments."""
    return ConvNeXt(**arguments)


def _dims(first: int) -> tuple[int, ...]:
    return tuple(first * 2**stage for stage in range(4))


_SIZES = {
    "atto": {"depths": (2, 2, 6, 2), "dims": _dims(40), "conv_mlp": True},
    "femto": {"depths": (2, 2, 6, 2), "dims": _dims(48), "conv_mlp": True},
    "pico": {"depths": (2, 2, 6, 2), "dims": _dims(64), "conv_mlp": True},
    "nano": {"depths": (2, 2, 8, 2), "dims": _dims(80), "conv_mlp": True},
    "tiny": {"depths": (3, 3, 9, 3), "dims": _dims(96)},
    "small": {"depths": (3, 3, 27, 3), "dims": _dims(96)},
    "base": {"depths": (3, 3, 27, 3), "dims": _dims(128)},
    "large": {"depths": (3, 3, 27, 3), "dims": _dims(192)},
}
_XLARGE = {"depths": (3, 3, 27, 3), "dims": _dims(256)}
_HUGE = {"depths": (3, 3, 27, 3), "dims": _dims(352)}
_V2 = {"use_grn": True, "ls_init_value": None}

VARIANTS = {
    **{f"convnext_{size}": arguments for size, arguments in (_SIZES | {"xlarge": _XLARGE}).items()},
    **{f"convnextv2_{size}": {**arguments, **_V2} for size, arguments in (_SIZES | {"huge": _HUGE}).items()},
    "convnext_atto_ols": {**_SIZES["atto"], "stem_type": "overlap_tiered"},
    "convnext_femto_ols": {**_SIZES["femto"], "stem_type": "overlap_tiered"},
    "convnext_pico_ols": {**_SIZES["pico"], "stem_type": "overlap_tiered"},
    "convnext_nano_ols": {**_SIZES["nano"], "stem_type": "overlap"},
}

# The default checkpoints of these three sizes were first trained on ImageNet-12k.
INPUTS = dict.fromkeys(("convnext_nano", "convnext_tiny", "convnext_small"), Input(crop=0.95))

NAMES = {
    "timm": [
        (r"^stem_(\d)", r"stem.\1"),
        (r"^stages_(\d)_(downsample|blocks)_(\d+)", r"stages.\1.\2.\3"),
        (r"\.mlp_", ".mlp."),
        (r"^head_", "head."),
    ],
    "official": [
        (r"^stem_(\d)", r"downsample_layers.0.\1"),
        (r"^stages_(\d)_downsample_(\d)", r"downsample_layers.\1.\2"),
        (r"^stages_(\d)_blocks_(\d+)", r"stages.\1.\2"),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp_fc(\d)\.", r".pwconv\1."),
        (r"(\.pwconv\d\.weight)$", r"\1", lambda shape: shape[:2]),
        (r"\.mlp_grn\.weight$", ".grn.gamma", lambda shape: (1, 1, 1, *shape)),
        (r"\.mlp_grn\.bias$", ".grn.beta", lambda shape: (1, 1, 1, *shape)),
        (r"^head_norm", "norm"),
        (r"^head_fc", "head"),
    ],
}
