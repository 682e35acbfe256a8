"""All-MLP image classifiers: MLP-Mixer and ResMLP.

Sources: Tolstikhin et al. 2021 (MLP-Mixer, arXiv 2105.01601); Touvron et al. 2021 (ResMLP, arXiv 2105.03404). Arguments
and official names are timm's.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import HALF, Input
from research.layers import drop
from research.layers.dense import Dense
from research.layers.drop import Dropout, DropPath
from research.layers.mlp import Mlp
from research.layers.norm import LayerNorm
from research.layers.patch_embed import PatchEmbed
from research.layers.remat import rematerialised
from research.layers.transformer import layer_scale

xavier = nn.initializers.xavier_uniform()
MLP_INIT = {"kernel_init": xavier, "bias_init": nn.initializers.normal(1e-6)}


class Affine(nn.Module):
    """`alpha * x + beta` for every channel, (..., C) -> (..., C): what ResMLP has in the place of a norm."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*[1] * (x.ndim - 1), -1)
        alpha = self.param("alpha", nn.initializers.ones, (x.shape[-1],)).astype(self.dtype)
        beta = self.param("beta", nn.initializers.zeros, (x.shape[-1],)).astype(self.dtype)
        return alpha.reshape(shape) * x + beta.reshape(shape)


class MixerBlock(nn.Module):
    """An MLP over tokens, then one over channels, each on normalised tokens and added to them: (B, N, C) -> (B, N, C).

    Fields:
      mlp_ratio: hidden widths of the token MLP and of the channel MLP, both relative to C.
    """

    mlp_ratio: tuple[float, float]
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        tokens, channels = (int(ratio * x.shape[-1]) for ratio in self.mlp_ratio)
        y = LayerNorm(dtype=self.dtype, name="norm1")(x).swapaxes(1, 2)
        y = Mlp(tokens, dtype=self.dtype, name="mlp_tokens", **MLP_INIT)(y).swapaxes(1, 2)
        x = x + DropPath(self.drop_path)(y, train)
        y = LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = Mlp(channels, dtype=self.dtype, name="mlp_channels", **MLP_INIT)(y)
        return x + DropPath(self.drop_path)(y, train)


class ResBlock(nn.Module):
    """A linear map over tokens, then an MLP over channels, with layer scale: (B, N, C) -> (B, N, C).

    Fields:
      mlp_ratio: the second is the hidden width of the MLP relative to C.
      init_values: initial layer scale.
    """

    mlp_ratio: tuple[float, float]
    init_values: float
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = Affine(dtype=self.dtype, name="norm1")(x).swapaxes(1, 2)
        y = Dense(x.shape[1], dtype=self.dtype, kernel_init=xavier, name="linear_tokens")(y).swapaxes(1, 2)
        x = x + DropPath(self.drop_path)(layer_scale(self, "ls1", y, self.init_values), train)
        y = Affine(dtype=self.dtype, name="norm2")(x)
        y = Mlp(int(self.mlp_ratio[1] * x.shape[-1]), dtype=self.dtype, name="mlp_channels", **MLP_INIT)(y)
        return x + DropPath(self.drop_path)(layer_scale(self, "ls2", y, self.init_values), train)


class Mixer(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm unless noted:
      img_size, patch_size: sides in pixels, or (height, width).
      embed_dim, num_blocks: width and number of blocks.
      mlp_ratio: hidden widths relative to `embed_dim`, of the token MLP and of the channel MLP.
      block: `mixer` or `resmlp` (timm names the classes).
      init_values: initial layer scale of `resmlp`.
      drop_path: largest rate of stochastic depth, growing with depth (in timm the same for all blocks).
      drop_rate: dropout before the classifier.
      remat: see `research.layers.remat`.

    Endpoints: `patch_embed`, `block01`.., `tokens` (after the final norm), `pooled` (their mean). With `num_classes` 0
    the logits are the pooled features.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    embed_dim: int = 512
    num_blocks: int = 8
    mlp_ratio: float | tuple[float, float] = (0.5, 4.0)
    block: str = "mixer"
    init_values: float = 1e-4
    num_classes: int = 1000
    drop_rate: float = 0.0
    drop_path: float = 0.0
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = PatchEmbed(
            self.embed_dim,
            self.patch_size,
            self.img_size,
            kernel_init=nn.initializers.lecun_normal(),
            bias_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="stem",
        )(images)
        x = x.reshape(x.shape[0], -1, self.embed_dim)
        endpoints = {"patch_embed": x}

        residual = self.block == "resmlp"
        block = rematerialised(ResBlock if residual else MixerBlock, self.remat)
        options = {"init_values": self.init_values} if residual else {}
        ratios = (self.mlp_ratio,) * 2 if isinstance(self.mlp_ratio, int | float) else self.mlp_ratio
        for index, rate in enumerate(drop.rates(self.drop_path, self.num_blocks)):
            layer = block(mlp_ratio=ratios, drop_path=rate, dtype=self.dtype, name=f"blocks_{index}", **options)
            x = endpoints[f"block{index + 1:02d}"] = layer(x, train)

        x = endpoints["tokens"] = (Affine if residual else LayerNorm)(dtype=self.dtype, name="norm")(x)
        pooled = endpoints["pooled"] = jnp.mean(x, axis=1)
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        head = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="head")
        return head(x), endpoints


def build(**arguments) -> Mixer:
    """The module; see `Mixer` for the arguments.

    Raises:
      ValueError: `block` is neither `mixer` nor `resmlp`.
    """
    model = Mixer(**arguments)
    if model.block not in ("mixer", "resmlp"):
        raise ValueError(f"block: {model.block!r} is neither 'mixer' nor 'resmlp'")
    return model


_MIXERS = {"s": (512, 8), "b": (768, 12), "l": (1024, 24)}
_RESMLP = {"block": "resmlp", "embed_dim": 384, "mlp_ratio": 4.0}

VARIANTS = {
    **{
        f"mixer_{size}{patch}_224": {"patch_size": patch, "embed_dim": width, "num_blocks": depth}
        for size, (width, depth) in _MIXERS.items()
        for patch in (32, 16)
    },
    "resmlp_12_224": {**_RESMLP, "num_blocks": 12},
    "resmlp_24_224": {**_RESMLP, "num_blocks": 24, "init_values": 1e-5},
    "resmlp_36_224": {**_RESMLP, "num_blocks": 36, "init_values": 1e-6},
    "resmlp_big_24_224": {**_RESMLP, "patch_size": 8, "embed_dim": 768, "num_blocks": 24, "init_values": 1e-6},
}

INPUTS = {name: Input(mean=HALF, std=HALF) for name in VARIANTS if name.startswith("mixer_")}

_BLOCKS = (r"^blocks_(\d+)", r"blocks.\1")
NAMES = {
    "timm": [_BLOCKS, (r"\.(alpha|beta)$", r".\1", lambda shape: (1, 1, *shape))],
    # ResMLP's own checkpoints.
    "official": [
        _BLOCKS,
        ("^stem", "patch_embed"),
        ("linear_tokens", "attn"),
        ("mlp_channels", "mlp"),
        (r"ls(\d)$", r"gamma_\1"),
    ],
}
