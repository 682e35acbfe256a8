"""BEiT and BEiT v2: vision transformers with a bias by relative position in every block.

Sources: Bao et al. 2022 (arXiv 2106.08254), Peng et al. 2022 (v2, arXiv 2208.06366), which share the network. Arguments
and official names are timm's.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import HALF, Input
from research.layers import drop
from research.layers.drop import Dropout
from research.layers.norm import LayerNorm
from research.layers.patch_embed import PatchEmbed, grid
from research.layers.remat import rematerialised
from research.layers.transformer import Block

normal = nn.initializers.normal(0.02)


class Beit(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm:
      img_size, patch_size: sides in pixels, or (height, width).
      embed_dim, depth, num_heads, mlp_ratio: the blocks.
      qkv_bias: biases of queries and values; keys have none.
      init_values: initial layer scale, None for no layer scale.
      use_abs_pos_emb: learned positions added to the tokens.
      use_rel_pos_bias: a bias of the scores by relative position, with a table in every block.
      head_init_scale: factor on the classifier's initial weights.
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      remat: see `research.layers.remat`.

    Endpoints: `patch_embed`, `block01`.., `tokens` (as the last block leaves them: there is no final norm), `pooled`
    (the mean of the patch tokens, normalised). With `num_classes` 0 the logits are the pooled features.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    init_values: float | None = None
    use_abs_pos_emb: bool = True
    use_rel_pos_bias: bool = False
    head_init_scale: float = 0.001
    num_classes: int = 1000
    drop_rate: float = 0.0
    drop_path: float = 0.0
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = PatchEmbed(self.embed_dim, self.patch_size, self.img_size, dtype=self.dtype, name="patch_embed")(images)
        x = x.reshape(x.shape[0], -1, self.embed_dim)
        endpoints = {"patch_embed": x}
        token = self.param("cls_token", normal, (1, 1, self.embed_dim)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.embed_dim)), x], axis=1)
        if self.use_abs_pos_emb:
            x = x + self.param("pos_embed", normal, (1, *x.shape[1:])).astype(self.dtype)

        block = rematerialised(Block, self.remat)
        for index, rate in enumerate(drop.rates(self.drop_path, self.depth)):
            x = endpoints[f"block{index + 1:02d}"] = block(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                qkv_bias=self.qkv_bias,
                key_bias=False,
                window=grid(self.img_size, self.patch_size) if self.use_rel_pos_bias else None,
                init_values=self.init_values,
                drop_path=rate,
                # Bao et al., section 2.5: what writes to the residual stream starts smaller the deeper it is.
                out_init=nn.initializers.normal(0.02 / math.sqrt(2 * (index + 1))),
                dtype=self.dtype,
                name=f"blocks_{index}",
            )(x, train)

        endpoints["tokens"] = x
        pooled = LayerNorm(dtype=self.dtype, name="fc_norm")(jnp.mean(x[:, 1:], axis=1))
        endpoints["pooled"] = pooled
        if self.num_classes == 0:
            return pooled, endpoints
        x = Dropout(self.drop_rate)(pooled, train)
        head_init = nn.initializers.normal(0.02 * self.head_init_scale)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=head_init, name="head")(x), endpoints


def unpatchify(tokens: jax.Array, p: int, grid: tuple[int, int] | None = None) -> jax.Array:
    """A map of finer resolution from tokens: (B, N, p*p*C) -> (B, rows*p, columns*p, C).

    Every token's channels are read as a p x p patch of C channels. The blocks of a plain transformer become a feature
    pyramid so, for hint losses that expect one (Hao et al. 2023, VanillaKD).

    Args:
      tokens: patch tokens in row-major order. One leading class token is dropped where the count shows there is one.
      p: side of the patch a token unfolds to.
      grid: (rows, columns) of the patches; a square by default.
    Raises:
      ValueError: the tokens fill no grid, or the channels do not divide by p * p.
    """
    batch, count, channels = tokens.shape
    rows, columns = grid or (math.isqrt(count),) * 2
    if count not in (rows * columns, rows * columns + 1) or channels % (p * p):
        raise ValueError(
            f"{count} tokens of {channels} channels do not unfold to {rows}x{columns} patches of {p}x{p}: give `grid`, "
            "or a p whose square divides the channels"
        )
    x = tokens[:, count - rows * columns :].reshape(batch, rows, columns, p, p, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * p, columns * p, -1)


def build(**arguments) -> Beit:
    """The module; see `Beit` for the arguments."""
    return Beit(**arguments)


_POSITIONS = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}
_BASE = {**_POSITIONS, "embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {**_POSITIONS, "embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 1e-5}

VARIANTS = {
    "beit_base_patch16_224": {**_BASE, "init_values": 0.1},
    "beit_base_patch16_384": {**_BASE, "init_values": 0.1, "img_size": 384},
    "beit_large_patch16_224": _LARGE,
    "beit_large_patch16_384": {**_LARGE, "img_size": 384},
    "beit_large_patch16_512": {**_LARGE, "img_size": 512},
    "beitv2_base_patch16_224": {**_BASE, "init_values": 1e-5},
    "beitv2_large_patch16_224": _LARGE,
}

INPUTS = {
    "beit_base_patch16_224": Input(mean=HALF, std=HALF, crop=0.9),
    "beit_large_patch16_224": Input(mean=HALF, std=HALF, crop=0.9),
    **{name: Input(size=int(name[-3:]), mean=HALF, std=HALF, crop=1.0) for name in VARIANTS if name[-3:] != "224"},
    "beitv2_base_patch16_224": Input(crop=0.9),
    "beitv2_large_patch16_224": Input(crop=0.95),
}

NAMES = {"timm": [(r"^blocks_(\d+)", r"blocks.\1"), (r"\.position\.", ".attn.")]}

# A buffer of older checkpoints, computed here from the grid.
IGNORED = (r"\.relative_position_index$",)

# Parameters that timm's `no_weight_decay()` spares, as regular expressions on our paths.
NO_DECAY = (r"(^|/)(pos_embed|cls_token|relative_position_bias_table)$",)
