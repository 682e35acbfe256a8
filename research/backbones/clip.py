"""CLIP: a tower for images and one for texts, whose outputs are compared by their cosine.

Source: Radford et al. 2021 (arXiv 2103.00020), sections 2.4 and 2.5. Official names are those of Hugging Face's
`CLIPModel`; the image tower alone, under timm's names, is in `research.backbones.vit`.
"""

import fractions
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import Input
from research.backbones.vit import ACTIVATIONS, CLIP_MEAN, CLIP_STD, ViT, normal
from research.layers.norm import LayerNorm, accumulation_dtype
from research.layers.remat import rematerialised
from research.layers.transformer import Block

EPSILON = 1e-5
# Added to the scores of tokens that must not be seen. Twice it is still finite.
UNSEEN = -1e38


def causal_mask(length: int, seen: jax.Array | None = None) -> jax.Array:
    """What to add to scores so that no token sees a later one: (1, N, N) float32, or (B, 1, N, N) with `seen`.

    Args:
      seen: (B, N), zero for tokens that no token is to see.
    """
    mask = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, UNSEEN)[None]
    return mask if seen is None else mask[None] + jnp.where(seen[:, None, None, :] != 0, 0.0, UNSEEN)


class TextTower(nn.Module):
    """A causal transformer over token ids: (B, N) integers -> states (B, N, width), normalised.

    Fields:
      vocabulary, context: number of token ids, and of positions, which is the largest N.
      width, depth, num_heads, hidden: the blocks, with the hidden width of their MLPs.
      act_layer: key of `research.backbones.vit.ACTIVATIONS`.
      remat: see `research.layers.remat`.
    Raises:
      ValueError: more tokens than positions.
    """

    vocabulary: int = 49408
    context: int = 77
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    hidden: int = 2048
    act_layer: str = "quick_gelu"
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, seen: jax.Array | None = None, train: bool = False) -> jax.Array:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"{length} tokens do not fit the {self.context} positions of the text tower: cut them")
        table = self.param("token_embedding", normal, (self.vocabulary, self.width))
        positions = self.param("position_embedding", nn.initializers.normal(0.01), (self.context, self.width))
        x = (jnp.take(table, tokens, axis=0, mode="clip") + positions[None, :length]).astype(self.dtype)
        mask, block = causal_mask(length, seen), rematerialised(Block, self.remat)
        for index in range(self.depth):
            x = block(
                num_heads=self.num_heads,
                mlp_ratio=fractions.Fraction(self.hidden, self.width),
                fused=False,
                act=ACTIVATIONS[self.act_layer],
                epsilon=EPSILON,
                dtype=self.dtype,
                name=f"layers_{index}",
            )(x, train, mask)
        return LayerNorm(EPSILON, self.dtype, name="final_layer_norm")(x)


class CLIP(nn.Module):
    """Images and texts in one space.

    Called as other networks it embeds images: (B, H, W, 3) -> (B, num_classes), projected and not normalised, with the
    endpoints of `ViT`. With texts `tokens` (T, N) its endpoints hold these as well:

      `image_embeds`, `text_embeds`: of length 1, (B, num_classes) and (T, num_classes).
      `text_features`: the texts' before that; `text_pooled`: their states at the end of text, before the projection.
      `logits_per_image`: cosines times the exponential of the learned `logit_scale`, (B, T).

    Embeddings and these logits are float32 or better; without projections only towers of equal width have them.

    Fields:
      img_size, patch_size, embed_dim, depth, num_heads, hidden: the image tower, with the hidden width of its MLPs.
      text_width, text_depth, text_heads, text_hidden, vocabulary, context: the text tower.
      eos: id of the token that ends a text, whose first place is read; None reads the place of the largest id, as
        OpenAI's code does.
      num_classes: dimensions of the joint space; 0 for neither projection.
      act_layer, text_act: keys of `research.backbones.vit.ACTIVATIONS`.
      remat: see `research.layers.remat`.

    The weights are drawn as those of `ViT` are, not by the paper's recipe for training from the start.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 32
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    hidden: int = 3072
    act_layer: str = "quick_gelu"
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    text_hidden: int = 2048
    text_act: str = "quick_gelu"
    vocabulary: int = 49408
    context: int = 77
    eos: int | None = None
    num_classes: int = 512
    remat: bool | str = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        tokens: jax.Array | None = None,
        seen: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`seen` (T, N) is zero for tokens that are padding."""
        features, endpoints = ViT(
            img_size=self.img_size,
            patch_size=self.patch_size,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=fractions.Fraction(self.hidden, self.embed_dim),
            pre_norm=True,
            act_layer=self.act_layer,
            norm_eps=EPSILON,
            fused_qkv=False,
            head_bias=False,
            num_classes=self.num_classes,
            remat=self.remat,
            dtype=self.dtype,
            name="vision",
        )(images, train)
        scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), ())
        if tokens is None and self.is_initializing():
            tokens = jnp.zeros((1, self.context), jnp.int32)  # so that the text tower has its parameters
        if tokens is None:
            return features, endpoints

        states = TextTower(
            vocabulary=self.vocabulary,
            context=self.context,
            width=self.text_width,
            depth=self.text_depth,
            num_heads=self.text_heads,
            hidden=self.text_hidden,
            act_layer=self.text_act,
            remat=self.remat,
            dtype=self.dtype,
            name="text",
        )(tokens, seen, train)
        last = jnp.argmax(tokens if self.eos is None else tokens == self.eos, axis=1)
        pooled = text = jnp.take_along_axis(states, last[:, None, None], axis=1, mode="clip")[:, 0]
        if self.num_classes:
            text = nn.Dense(self.num_classes, False, self.dtype, kernel_init=normal, name="text_projection")(pooled)
        endpoints |= {"text_pooled": pooled, "text_features": text}
        if features.shape[-1] == text.shape[-1]:
            wide = [x.astype(accumulation_dtype(x)) for x in (features, text)]
            image_embeds, text_embeds = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in wide)
            cosines = image_embeds @ text_embeds.T
            endpoints |= {
                "image_embeds": image_embeds,
                "text_embeds": text_embeds,
                "logits_per_image": cosines * jnp.exp(scale).astype(cosines.dtype),
            }
        return features, endpoints


def build(**arguments) -> CLIP:
    """The module; see `CLIP` for the arguments.

    Raises:
      ValueError: an unknown activation.
    """
    model = CLIP(**arguments)
    for key in ("act_layer", "text_act"):
        if getattr(model, key) not in ACTIVATIONS:
            raise ValueError(f"{key}: {getattr(model, key)!r} is none of {', '.join(ACTIVATIONS)}")
    return model


_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "hidden": 3072}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "hidden": 4096}
_LARGE_TEXT = {"text_width": 768, "text_heads": 12, "text_hidden": 3072, "num_classes": 768}

VARIANTS = {
    "clip_vit_b32_full": {**_BASE, "patch_size": 32},
    "clip_vit_b16_full": {**_BASE, "patch_size": 16},
    "clip_vit_l14_full": {**_LARGE, **_LARGE_TEXT, "patch_size": 14},
}

INPUTS = dict.fromkeys(VARIANTS, Input(mean=CLIP_MEAN, std=CLIP_STD, crop=1.0))

_flat = lambda shape: shape[-1:]
_table = lambda shape: shape[-2:]

NAMES = {
    "huggingface": [
        (r"^vision\.head\.", "visual_projection."),
        (r"^vision\.cls_token$", "vision_model.embeddings.class_embedding", _flat),
        (r"^vision\.pos_embed$", "vision_model.embeddings.position_embedding.weight", _table),
        (r"^vision\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^vision\.norm_pre\.", "vision_model.pre_layrnorm."),  # as it is spelt there
        (r"^vision\.norm\.", "vision_model.post_layernorm."),
        (r"^vision\.blocks_(\d+)", r"vision_model.encoder.layers.\1"),
        (r"^text\.(token|position)_embedding$", r"text_model.embeddings.\1_embedding.weight"),
        (r"^text\.final_layer_norm", "text_model.final_layer_norm"),
        (r"^text\.layers_(\d+)", r"text_model.encoder.layers.\1"),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
        (r"\.attn\.", ".self_attn."),
        (r"\.norm(\d)\.", r".layer_norm\1."),
    ]
}

# Buffers of older files.
IGNORED = (r"\.embeddings\.position_ids$",)

# Parameters without weight decay, as regular expressions on our paths.
NO_DECAY = (r"(^|/)(pos_embed|cls_token|token_embedding|position_embedding|logit_scale)$",)
