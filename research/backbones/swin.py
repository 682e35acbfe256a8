"""Swin transformer: attention in windows that shift from block to block, and a pyramid of four resolutions.

Source: Liu et al. 2021 (arXiv 2103.14030). Arguments and official names are timm's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.backbones import Input
from research.layers import drop
from research.layers.attention import Attention
from research.layers.dense import Dense
from research.layers.drop import Dropout, DropPath
from research.layers.mlp import Mlp
from research.layers.norm import LayerNorm
from research.layers.patch_embed import PatchEmbed, pair
from research.layers.position import RelativePositionBias
from research.layers.remat import rematerialised

EPSILON = 1e-5
# What the official network adds to the scores of tokens that only the cyclic shift made neighbours.
OTHER_REGION = -100.0

normal = nn.initializers.normal(0.02)


def partition(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Windows of a map: (B, H, W, C) -> (B, windows, tokens of a window, C), both in row-major order."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window[0] * window[1], channels)


def merge(windows: jax.Array, window: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """The map of `size` (H, W) whose `partition` is `windows`."""
    batch, _, _, channels = windows.shape
    x = windows.reshape(batch, size[0] // window[0], size[1] // window[1], *window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *size, channels)


def shift_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> jax.Array:
    """What to add to the scores within each window of a map rolled by `shift`: (windows, tokens, tokens) float32.

    Tokens that the roll brought together from opposite sides of the image do not see each other.
    """

    def band(side, window, shift):
        edges = (side - window, side - shift) if shift else ()
        return np.searchsorted(edges, np.arange(side), side="right")

    rows, columns = (band(*axis) for axis in zip(size, window, shift, strict=True))
    regions = jnp.asarray(3 * rows[:, None] + columns, jnp.int32)[None, :, :, None]
    regions = partition(regions, window)[0, :, :, 0]
    return jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, OTHER_REGION)


class Block(nn.Module):
    """Attention in (shifted) windows, then an MLP, each on normalised maps and added: (B, H, W, C) -> (B, H, W, C).

    The window is cut to the map, and a map no larger than its window is not shifted. Maps are rolled first and padded
    with zeros to whole windows afterwards; padding takes part in the attention, as in the official network.

    Fields:
      window: (rows, columns) of a window.
      shifted: rolls the map by half a window.
      drop_path: rate of stochastic depth.
    """

    num_heads: int
    window: tuple[int, int] = (7, 7)
    shifted: bool = False
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self._attend(LayerNorm(EPSILON, self.dtype, name="norm1")(x))
        x = x + DropPath(self.drop_path)(y, train)
        mlp = Mlp(int(self.mlp_ratio * x.shape[-1]), dtype=self.dtype, name="mlp")
        y = mlp(LayerNorm(EPSILON, self.dtype, name="norm2")(x))
        return x + DropPath(self.drop_path)(y, train)

    def _attend(self, x: jax.Array) -> jax.Array:
        size = x.shape[1:3]
        window = tuple(min(side, w) for side, w in zip(size, self.window, strict=True))
        half = [w // 2 if self.shifted and side > w else 0 for side, w in zip(size, self.window, strict=True)]
        shift = tuple(half)
        x = jnp.roll(x, (-shift[0], -shift[1]), axis=(1, 2)) if any(shift) else x
        padding = [-side % w for side, w in zip(size, window, strict=True)]
        x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0))) if any(padding) else x
        padded = x.shape[1:3]

        bias = RelativePositionBias(window, self.num_heads, init=normal, name="position")()
        if any(shift):
            bias = bias[None] + shift_mask(padded, window, shift).astype(bias.dtype)[:, None]
        attn = Attention(self.num_heads, self.qkv_bias, dtype=self.dtype, name="attn")
        x = merge(attn(partition(x, window), bias), window, padded)[:, : size[0], : size[1]]
        return jnp.roll(x, shift, axis=(1, 2)) if any(shift) else x


class PatchMerging(nn.Module):
    """Halves the resolution: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), features); odd sides are padded with zeros."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        x = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
        # Neighbours (row, column) in the order (0, 0), (1, 0), (0, 1), (1, 1).
        x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, (height + 1) // 2, (width + 1) // 2, 4 * channels)
        x = LayerNorm(EPSILON, self.dtype, name="norm")(x)
        return Dense(self.features, False, self.dtype, kernel_init=normal, name="reduction")(x)


class Swin(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm:
      img_size, patch_size, window_size: sides, or (height, width); the window in tokens, the others in pixels.
      embed_dim: width of the first stage; every further stage has twice that of the one before.
      depths, num_heads: blocks and heads of each stage. Every second block is shifted.
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      remat: see `research.layers.remat`.

    Endpoints: `patch_embed`, `stage1`.. (all maps (B, H, W, C)), `tokens` (the last map after the final norm,
    (B, N, C)), `pooled`. With `num_classes` 0 the logits are the pooled features.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 4
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, int] = 7
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
        for stage, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            if stage:
                x = PatchMerging(2 * x.shape[-1], self.dtype, name=f"layers_{stage}_downsample")(x)
            for index in range(depth):
                x = block(
                    num_heads=heads,
                    window=pair(self.window_size),
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


def build(**arguments) -> Swin:
    """The module; see `Swin` for the arguments."""
    return Swin(**arguments)


_SIZES = {
    # The two small ones are OFA-KD's students (arXiv 2310.19444), no variants of timm.
    "pico": {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)},
    "nano": {"embed_dim": 64, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)},
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}

VARIANTS = {
    **{f"swin_{size}_patch4_window7_224": arguments for size, arguments in _SIZES.items()},
    **{
        f"swin_{size}_patch4_window12_384": {**_SIZES[size], "img_size": 384, "window_size": 12}
        for size in ("base", "large")
    },
}

INPUTS = {name: Input(size=384, crop=1.0) if name.endswith("_384") else Input(crop=0.9) for name in VARIANTS}

_COMMON = [(r"^patch_embed_norm", "patch_embed.norm"), (r"blocks_(\d+)", r"blocks.\1"), (r"\.position\.", ".attn.")]

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

# Buffers of older checkpoints, computed here from the sizes.
IGNORED = (r"\.relative_position_index$", r"\.attn_mask$")

# Parameters that timm's `no_weight_decay()` spares, as regular expressions on our paths.
NO_DECAY = (r"/relative_position_bias_table$",)
