"""Swin transformer V2: cosine attention, norms after the branches, and a bias computed from relative positions.

Source: Liu et al. 2022 (arXiv 2111.09883). Arguments and official names are timm's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.backbones import Input
from research.layers import drop, windows
from research.layers.attention import Attention
from research.layers.dense import Dense
from research.layers.drop import Dropout, DropPath
from research.layers.mlp import Mlp
from research.layers.norm import LayerNorm
from research.layers.patch_embed import PatchEmbed, pair
from research.layers.position import relative_position_index
from research.layers.remat import rematerialised

EPSILON = 1e-5

normal = nn.initializers.normal(0.02)


def log_spaced_offsets(window: tuple[int, int], pretrained: int = 0) -> np.ndarray:
    """Every offset within a window, ((2 rows - 1) * (2 columns - 1), 2) float64, in [-log2(9)/3, log2(9)/3].

    Offsets are relative to the window, or to that of `pretrained` tokens of the training before, times 8; then
    `sign(x) log2(1 + |x|) / log2(8)` (paper, equation 4, whose base the official code changes).
    """
    sides = (pretrained,) * 2 if pretrained else window
    # A window of one token only has the offset 0.
    rows, columns = (8 * np.arange(1 - w, w) / max(side - 1, 1) for w, side in zip(window, sides, strict=True))
    offsets = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.sign(offsets) * np.log2(1 + np.abs(offsets)) / 3


class ContinuousPositionBias(nn.Module):
    """A bias for every relative position, computed by a small network: () -> (heads, N, N) in [0, 16].

    In float32 or better, whatever the network's dtype (paper, equation 3).
    """

    window: tuple[int, int]
    num_heads: int
    pretrained: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self) -> jax.Array:
        wide = jnp.float64 if jnp.dtype(self.dtype) == jnp.float64 else jnp.float32
        options = {"dtype": wide, "kernel_init": normal}
        offsets = jnp.asarray(log_spaced_offsets(self.window, self.pretrained), wide)
        hidden = nn.relu(nn.Dense(512, name="cpb_mlp_0", **options)(offsets))
        table = nn.Dense(self.num_heads, use_bias=False, name="cpb_mlp_2", **options)(hidden)
        index = relative_position_index(*self.window)
        bias = jnp.take(table, index.ravel(), axis=0, mode="clip").reshape(*index.shape, self.num_heads)
        return 16 * nn.sigmoid(jnp.moveaxis(bias, -1, 0))


class Block(nn.Module):
    """Attention in (shifted) windows, then an MLP, each normalised before it is added: (B, H, W, C) -> (B, H, W, C).

    The window is cut to the map, and a map no larger than its window is not shifted; see `research.layers.windows`.

    Fields:
      window: (rows, columns) of a window; `pretrained`: side of the one the position bias was first trained for.
      shifted: rolls the map by half a window.
      drop_path: rate of stochastic depth.
    """

    num_heads: int
    window: tuple[int, int] = (7, 7)
    pretrained: int = 0
    shifted: bool = False
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        # The branches start at zero.
        norm = lambda name: LayerNorm(EPSILON, self.dtype, nn.initializers.zeros, name=name)
        layout = windows.layout(x.shape[1:3], self.window, self.shifted)
        position = {"pretrained": self.pretrained, "dtype": self.dtype, "name": "position"}
        bias = ContinuousPositionBias(layout.window, self.num_heads, **position)()
        options = {"key_bias": False, "cosine": True, "kernel_init": normal, "dtype": self.dtype}
        attn = Attention(self.num_heads, self.qkv_bias, name="attn", **options)
        x = x + DropPath(self.drop_path)(norm("norm1")(windows.attended(x, layout, bias, attn)), train)
        mlp = Mlp(int(self.mlp_ratio * x.shape[-1]), dtype=self.dtype, name="mlp")
        return x + DropPath(self.drop_path)(norm("norm2")(mlp(x)), train)


class PatchMerging(nn.Module):
    """Halves the resolution, then normalises: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), features)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        reduction = Dense(self.features, False, self.dtype, kernel_init=normal, name="reduction")
        return LayerNorm(EPSILON, self.dtype, name="norm")(reduction(windows.neighbours(x)))


class SwinV2(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm:
      img_size, patch_size, window_size: sides, or (height, width); the window in tokens, the others in pixels.
      embed_dim: width of the first stage; every further stage has twice that of the one before.
      depths, num_heads: blocks and heads of each stage. Every second block is shifted.
      pretrained_window_sizes: sides of each stage's window in the training before, where that had others.
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      remat: see `research.layers.remat`.

    Endpoints: `patch_embed`, `stage1`.. (all maps (B, H, W, C)), `tokens` (the last map after the final norm,
    (B, N, C)), `pooled`. With `num_classes` 0 the logits are the pooled features.
    """

    img_size: int | tuple[int, int] = 256
    patch_size: int | tuple[int, int] = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, int] = 8
    pretrained_window_sizes: tuple[int, ...] | None = None
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    num_classes: int = 1000
    drop_rate: float = 0.0
    drop_path: float = 0.0
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = PatchEmbed(self.embed_dim, self.patch_size, self.img_size, dtype=self.dtype, name="patch_embed")(images)
        x = LayerNorm(EPSILON, self.dtype, name="patch_embed_norm")(x)
        endpoints = {"patch_embed": x}

        block = rematerialised(Block, self.remat)
        rates = iter(drop.rates(self.drop_path, sum(self.depths)))
        pretrained = self.pretrained_window_sizes or (0,) * len(self.depths)
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            if stage:
                x = PatchMerging(2 * x.shape[-1], self.dtype, name=f"layers_{stage}_downsample")(x)
            for index in range(depth):
                x = block(
                    num_heads=heads,
                    window=pair(self.window_size),
                    pretrained=pretrained[stage],
                    shifted=index % 2 == 1,
                    mlp_ratio=self.mlp_ratio,
                    qkv_bias=self.qkv_bias,
                    drop_path=next(rates),
                    dtype=self.dtype,
                    name=f"layers_{stage}_blocks_{index}",
                )(x, train)
            endpoints[f"stage{stage + 1}"] = x

        x = LayerNorm(EPSILON, self.dtype, name="norm")(x)
        endpoints["tokens"] = x.reshape(x.shape[0], -1, x.shape[-1])
        pooled = endpoints["pooled"] = jnp.mean(x, axis=(1, 2))
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=normal, name="head")(x), endpoints


def build(**arguments) -> SwinV2:
    """The module; see `SwinV2` for the arguments."""
    return SwinV2(**arguments)


_SIZES = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
# Side of the images and of the windows after training at 192 pixels with windows of 12.
_LARGER = {"12to16_192to256": (256, 16), "12to24_192to384": (384, 24)}

VARIANTS = {
    **{
        f"swinv2_{size}_window{window}_256": {**_SIZES[size], "window_size": window}
        for size in ("tiny", "small", "base")
        for window in (8, 16)
    },
    **{
        f"swinv2_{size}_window12_192": {**_SIZES[size], "img_size": 192, "window_size": 12}
        for size in ("base", "large")
    },
    **{
        f"swinv2_{size}_window{name}": {
            **_SIZES[size],
            "img_size": side,
            "window_size": window,
            "pretrained_window_sizes": (12, 12, 12, 6),
        }
        for size in ("base", "large")
        for name, (side, window) in _LARGER.items()
    },
}

INPUTS = {
    name: Input(size=arguments.get("img_size", 256), crop=1.0 if name.endswith("384") else 0.9)
    for name, arguments in VARIANTS.items()
}

_COMMON = [
    (r"^patch_embed_norm", "patch_embed.norm"),
    (r"blocks_(\d+)", r"blocks.\1"),
    (r"\.position\.", ".attn."),
    (r"cpb_mlp_(\d)", r"cpb_mlp.\1"),
]

# timm puts the patch merging at the start of a stage, the authors' checkpoints at the end of the one before.
NAMES = {
    "timm": [(r"^layers_(\d+)_", r"layers.\1."), (r"^head", "head.fc"), *_COMMON],
    "official": [
        (r"^layers_1_downsample", "layers.0.downsample"),
        (r"^layers_2_downsample", "layers.1.downsample"),
        (r"^layers_3_downsample", "layers.2.downsample"),
        (r"^layers_(\d+)_", r"layers.\1."),
        *_COMMON,
    ],
}

# Buffers, computed here from the sizes.
IGNORED = (r"\.relative_(position_index|coords_table)$", r"\.attn_mask$", r"\.k_bias$")

# Parameters that timm's `no_weight_decay()` spares, as regular expressions on our paths.
NO_DECAY = (r"/cpb_mlp_\d/", r"/logit_scale$")
