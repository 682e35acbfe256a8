"""Swin transformer: attention in windows that shift from block to block, and a pyramid of four resolutions.

Source: Liu et al. 2021 (arXiv 2103.14030). Arguments and official names are timm's.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import Input
from research.layers import drop, windows
from research.layers.attention import Attention
from research.layers.dense import Dense
from research.layers.drop import Dropout, DropPath
from research.layers.mlp import Mlp
from research.layers.norm import LayerNorm
from research.layers.patch_embed import PatchEmbed, pair
from research.layers.position import RelativePositionBias
from research.layers.remat import rematerialised

EPSILON = 1e-5
normal = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Attention in (shifted) windows, then an MLP, each on normalised maps and added: (B, H, W, C) -> (B, H, W, C).

    The window is cut to the map, and a map no larger than its window is not shifted; see `research.layers.windows`.

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
        layout = windows.layout(x.shape[1:3], self.window, self.shifted)
        bias = RelativePositionBias(layout.window, self.num_heads, init=normal, name="position")()
        attn = Attention(self.num_heads, self.qkv_bias, dtype=self.dtype, name="attn")
        return windows.attended(x, layout, bias, attn)


class PatchMerging(nn.Module):
    """Halves the resolution: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), features); odd sides are padded with zeros."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = LayerNorm(EPSILON, self.dtype, name="norm")(windows.neighbours(x))
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
