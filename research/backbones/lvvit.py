"""LV-ViT: a ViT with a convolutional stem whose patches are classified too, trained with a label for each of them.

Source: Jiang et al. 2021, "All Tokens Matter" (arXiv 2104.10858); the official code is zihangJiang/TokenLabeling,
whose arguments and names are used. Its MixToken, which mixes the patches of training images, is no part of the network.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import Input, vit
from research.layers import reduction
from research.layers.dense import Dense
from research.layers.drop import Dropout
from research.layers.norm import BatchNorm, LayerNorm
from research.layers.patch_embed import PatchEmbed, pair, torch_conv


class Stem(nn.Module):
    """Convolutions of `width` channels, 7x7 at stride 2 and twice 3x3: (B, H, W, 3) -> (B, H / 2, W / 2, width)."""

    width: int = 64
    bn_group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for index, (size, stride) in enumerate(((7, 2), (3, 1), (3, 1)), start=1):
            padding = ((size // 2, size // 2),) * 2
            options = {"use_bias": False, "kernel_init": torch_conv, "dtype": self.dtype, "name": f"conv{index}"}
            x = nn.Conv(self.width, (size, size), (stride, stride), padding=padding, **options)(x)
            x = nn.relu(BatchNorm(group=self.bn_group, dtype=self.dtype, name=f"bn{index}")(x, train))
        return x


class LVViT(vit.ViT):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields beside those of `ViT`:
      stem_width: channels of the stem's convolutions.
      skip_lam: what both branches of a block are divided by before they are added to the tokens.
      norm_eps: epsilon of all norms times `skip_lam` squared; `build` multiplies.
      bn_group: see `BatchNorm`.

    Tokens travel multiplied by `skip_lam` through blocks whose norms' epsilon is multiplied by its square: that is the
    same as dividing the branches, and the blocks are those of every ViT. A `reduce` sees them so; the endpoints
    `block01`.. are divided again. DynamicViT's predictors take `epsilon=1e-5 * skip_lam**2` for the published numbers.

    Endpoints: those of `ViT`, `head` and `aux` (B, patches, num_classes), the patches' logits. Logits are those of the
    class token while training, and in evaluation with half the largest of the patches' added to each.
    """

    mlp_ratio: float = 3.0
    qkv_bias: bool = False
    norm_eps: float = 4e-5
    stem_width: int = 64
    skip_lam: float = 2.0
    bn_group: int | None = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        (height, width), (rows, columns) = pair(self.img_size), pair(self.patch_size)
        if images.shape[1:3] != (height, width):
            size = images.shape[1:3]
            raise ValueError(
                f"images are {size[0]}x{size[1]} but the model is built for {height}x{width}: resize them or build it "
                f"with img_size={size}"
            )
        x = Stem(self.stem_width, self.bn_group, self.dtype, name="stem")(images, train)
        x = PatchEmbed(self.embed_dim, (rows // 2, columns // 2), dtype=self.dtype, name="patch_embed")(x)
        x = x.reshape(x.shape[0], -1, self.embed_dim)
        endpoints = {"patch_embed": x}
        blocks = [f"block{index + 1:02d}" for index in range(self.depth)]
        x, tokens = self._through_blocks(self.skip_lam * self._with_positions(x), train, endpoints)
        endpoints |= {name: endpoints[name] / self.skip_lam for name in blocks}
        x = endpoints["tokens"] = LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
        endpoints["pooled"] = x[:, 0]
        if self.num_classes == 0:
            return endpoints["pooled"], endpoints
        dense = functools.partial(Dense, self.num_classes, kernel_init=vit.normal, dtype=self.dtype)
        logits = endpoints["head"] = dense(name="head")(Dropout(self.drop_rate)(x[:, 0], train))
        patches = endpoints["aux"] = dense(name="aux_head")(x[:, 1:])
        if train:
            return logits, endpoints
        if tokens is not None and tokens.size is not None:  # a token of size 0 is padding
            patches = jnp.where(tokens.size[:, 1:, None] > 0, patches, -jnp.inf)
        return logits + 0.5 * jnp.max(patches, axis=1), endpoints


def build(*, skip_lam: float = 2.0, norm_eps: float = 1e-5, reduce=None, **arguments) -> LVViT:
    """The module; see `LVViT` for the arguments. `norm_eps` is that of the published network, 1e-5.

    Raises:
      ValueError: a distillation token, no class token, another pooling, patches of odd sides, or values that describe
        no reduction.
    """
    epsilon = norm_eps * skip_lam**2
    model = LVViT(skip_lam=skip_lam, norm_eps=epsilon, reduce=reduction.build(reduce), **arguments)
    if model.distilled or not model.class_token or model.global_pool != "token":
        raise ValueError("LV-ViT classifies its class token: leave distilled, class_token and global_pool as they are")
    if any(side % 2 for side in pair(model.patch_size)):
        raise ValueError(f"patch_size={model.patch_size}: the stem halves the image, so sides of patches are even")
    return model


VARIANTS = {
    "lvvit_t": {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0},
    "lvvit_s": {"embed_dim": 384, "depth": 16, "num_heads": 6},
    "lvvit_m": {"embed_dim": 512, "depth": 20, "num_heads": 8},
    "lvvit_l": {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_width": 128},
}

INPUTS = {name: Input(crop=1.0 if name in ("lvvit_m", "lvvit_l") else 0.9) for name in VARIANTS}

NAMES = {"official": [(r"^blocks_(\d+)", r"blocks.\1"), (r"^stem\.", "patch_embed.")]}

NO_DECAY = vit.NO_DECAY
