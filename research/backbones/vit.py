"""Vision transformers: ViT, DeiT, DeiT with a distillation token, DeiT III, the image towers of CLIP.

Sources: Dosovitskiy et al. 2021 (arXiv 2010.11929), Steiner et al. 2021 (augreg, arXiv 2106.10270); Touvron et al. 2021
(DeiT, arXiv 2012.12877); Touvron et al. 2022 (DeiT III, arXiv 2204.07118); Radford et al. 2021 (CLIP, arXiv
2103.00020). Arguments and official names are timm's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.backbones import HALF, Input
from research.layers import drop, reduction
from research.layers.drop import Dropout
from research.layers.mlp import gelu, quick_gelu
from research.layers.norm import LayerNorm, accumulation_dtype
from research.layers.patch_embed import PatchEmbed
from research.layers.reduction import Reduction, Tokens
from research.layers.remat import rematerialised
from research.layers.transformer import Block

# timm's `trunc_normal_(std=.02)` cuts at +-2, a hundred deviations away: a plain normal distribution.
normal = nn.initializers.normal(0.02)

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class ViT(nn.Module):
    """Image classifier: (B, H, W, 3) -> logits (B, num_classes) and endpoints.

    Fields, as in timm unless noted:
      img_size, patch_size: sides in pixels, or (height, width).
      embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the blocks.
      init_values: initial layer scale, None for no layer scale.
      class_token: a learned first token.
      distilled: a second one after it, with a classifier of its own.
      no_embed_class: learned positions for the patches only.
      pre_norm: the tokens are normalised before the blocks, and patches have no bias (CLIP).
      act_layer: of the MLPs, `gelu` or `quick_gelu`; norm_eps: epsilon of all norms.
      fused_qkv, head_bias: False for one dense layer each of queries, keys and values, and for a classifier without
        bias (not in timm; see `research.backbones.clip`).
      global_pool: what the classifier sees: `token` (the normalised class token) or `avg` (the mean of the patches,
        normalised afterwards).
      drop_path: largest rate of stochastic depth; drop_rate: dropout before the classifier.
      remat: see `research.layers.remat`.
      reduce: makes the tokens fewer on their way, a value of `research.tokens.<method>.reduction(...)`; `build` also
        takes the plain values that describe one (`research.layers.reduction.build`). Parameters and their names are
        those of the network without it, unless the method has some of its own.

    Endpoints: `patch_embed` (without positions), `block01`.., `tokens` (all tokens, normalised where the pooling is
    `token`), `pooled`; with `distilled` also the logits `head` and `head_dist`. A distilled network's logits are the
    mean of its heads in evaluation, and those of `head` while training, where `head_dist` learns from the teacher. With
    `num_classes` 0 the logits are the pooled features. With `reduce` also `origin` (which token holds each of the first
    ones), `size` where the method keeps it, and what the method records of each block; the pooling `avg` then weighs
    tokens by their sizes.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    distilled: bool = False
    no_embed_class: bool = False
    pre_norm: bool = False
    act_layer: str = "gelu"
    norm_eps: float = 1e-6
    fused_qkv: bool = True
    head_bias: bool = True
    global_pool: str = "token"
    num_classes: int = 1000
    drop_rate: float = 0.0
    drop_path: float = 0.0
    remat: bool | str = False
    reduce: Reduction | None = None
    dtype: jnp.dtype = jnp.float32

    @property
    def prefix(self) -> int:
        """Number of tokens before those of the patches."""
        return int(self.class_token) + int(self.distilled)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        options = {"use_bias": not self.pre_norm, "dtype": self.dtype, "name": "patch_embed"}
        x = PatchEmbed(self.embed_dim, self.patch_size, self.img_size, **options)(images)
        x = x.reshape(x.shape[0], -1, self.embed_dim)
        endpoints = {"patch_embed": x}
        x = self._with_positions(x)
        x = LayerNorm(self.norm_eps, self.dtype, name="norm_pre")(x) if self.pre_norm else x

        x, tokens = self._through_blocks(x, train, endpoints)
        averaged = self.global_pool == "avg"
        norm = LayerNorm(self.norm_eps, self.dtype, name="fc_norm" if averaged else "norm")
        x = endpoints["tokens"] = x if averaged else norm(x)
        # What each classifier sees: the mean of the patches, or the class token and, distilled, the one after it.
        seen = [norm(self._mean(x, tokens))] if averaged else [x[:, i] for i in range(self.prefix)]
        endpoints["pooled"] = sum(seen) / len(seen)
        if self.num_classes == 0:
            return endpoints["pooled"], endpoints
        heads, options = {}, {"use_bias": self.head_bias, "kernel_init": normal, "dtype": self.dtype}
        for name, features in zip(("head", "head_dist"), seen, strict=False):
            features = Dropout(self.drop_rate)(features, train)
            heads[name] = nn.Dense(self.num_classes, name=name, **options)(features)
        if self.distilled:
            endpoints |= heads
        logits = heads["head"] if train else sum(heads.values()) / len(heads)
        return logits, endpoints

    def _through_blocks(self, x: jax.Array, train: bool, endpoints: dict) -> tuple[jax.Array, Tokens | None]:
        """The tokens (B, N, C) after the last block, and with `reduce` their state; adds to the endpoints."""
        reduce, state, block = None, x, rematerialised(Block, self.remat)
        if self.reduce is not None:
            reduce = self.reduce.bind(self.depth, x.shape[1] - self.prefix, self.class_token, self.distilled)
            state = reduce.start(x)
        for index, rate in enumerate(drop.rates(self.drop_path, self.depth)):
            state = state if reduce is None else reduce.before(state, index, train)
            state = block(
                num_heads=self.num_heads,
                mlp_ratio=self.mlp_ratio,
                qkv_bias=self.qkv_bias,
                fused=self.fused_qkv,
                act=ACTIVATIONS[self.act_layer],
                epsilon=self.norm_eps,
                init_values=self.init_values,
                drop_path=rate,
                reduce=reduce,
                index=index,
                dtype=self.dtype,
                name=f"blocks_{index}",
            )(state, train)
            state = state if reduce is None else reduce.after(state, index, train)
            endpoints[f"block{index + 1:02d}"] = state if reduce is None else state.x
        if reduce is None:
            return state, None
        endpoints |= {"origin": state.origin, **state.record}
        if state.size is not None:
            endpoints["size"] = state.size
        return state.x, state

    def _mean(self, x: jax.Array, tokens: Tokens | None) -> jax.Array:
        """(B, C), the mean over the patches of tokens (B, N, C), merged ones counted as often as they have parts."""
        patches = x[:, self.prefix :]
        if tokens is None or tokens.size is None:
            return jnp.mean(patches, axis=1)
        size = tokens.size[:, self.prefix :, None]
        wide = patches.astype(accumulation_dtype(patches))
        return (jnp.sum(wide * size, axis=1) / jnp.sum(size, axis=1)).astype(x.dtype)

    def _with_positions(self, x: jax.Array) -> jax.Array:
        """Puts the learned tokens before the patches (B, N, C) and adds the learned positions."""
        batch, patches, width = x.shape
        tokens = []
        if self.class_token:
            tokens.append(self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, width)))
        if self.distilled:
            tokens.append(self.param("dist_token", normal, (1, 1, width)))
        length = patches if self.no_embed_class else patches + self.prefix
        positions = self.param("pos_embed", normal, (1, length, width)).astype(self.dtype)
        tokens = [jnp.broadcast_to(token.astype(self.dtype), (batch, 1, width)) for token in tokens]
        if self.no_embed_class:
            return jnp.concatenate([*tokens, x + positions], axis=1)
        return jnp.concatenate([*tokens, x], axis=1) + positions


def build(*, reduce: Reduction | Mapping[str, Any] | None = None, **arguments) -> ViT:
    """The module; see `ViT` for the arguments.

    Raises:
      ValueError: an unknown activation or pooling; a pooling that needs a class token the model has not; a distillation
        token without the pooling by token; values that describe no reduction.
    """
    model = ViT(reduce=reduction.build(reduce), **arguments)
    if model.act_layer not in ACTIVATIONS:
        raise ValueError(f"act_layer: {model.act_layer!r} is none of {', '.join(ACTIVATIONS)}")
    if model.global_pool not in ("token", "avg"):
        raise ValueError(f"global_pool: {model.global_pool!r} is neither 'token' nor 'avg'")
    if model.global_pool == "token" and not model.class_token:
        raise ValueError("global_pool='token' needs class_token=True: use global_pool='avg'")
    if model.distilled and model.global_pool != "token":
        raise ValueError("distilled=True reads its two tokens: use global_pool='token'")
    return model


_SIZES = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "medium": {"embed_dim": 512, "num_heads": 8},
    "base": {"embed_dim": 768, "num_heads": 12},
    "large": {"embed_dim": 1024, "num_heads": 16, "depth": 24},
    "huge": {"embed_dim": 1280, "num_heads": 16, "depth": 32},
}
_DEIT3 = {"init_values": 1e-6, "no_embed_class": True}
_CLIP = {
    "base_patch32": {**_SIZES["base"], "patch_size": 32},
    "base_patch16": _SIZES["base"],
    "large_patch14": {**_SIZES["large"], "patch_size": 14},
}
# OpenAI's weights need the approximate GELU; their classifier is CLIP's projection to the joint space.
_QUICK = {"pre_norm": True, "norm_eps": 1e-5, "act_layer": "quick_gelu"}
_VIT = {"tiny": (16,), "small": (32, 16), "base": (32, 16, 8), "large": (32, 16)}

VARIANTS = {
    **{f"vit_{size}_patch{p}_224": {**_SIZES[size], "patch_size": p} for size in _VIT for p in _VIT[size]},
    **{f"deit_{size}_patch16_224": _SIZES[size] for size in ("tiny", "small", "base")},
    **{f"deit_{size}_distilled_patch16_224": {**_SIZES[size], "distilled": True} for size in ("tiny", "small", "base")},
    **{f"deit3_{size}_patch16_224": {**_SIZES[size], **_DEIT3} for size in ("small", "medium", "base", "large")},
    "deit_base_patch16_384": {**_SIZES["base"], "img_size": 384},
    "deit_base_distilled_patch16_384": {**_SIZES["base"], "distilled": True, "img_size": 384},
    **{f"deit3_{size}_patch16_384": {**_SIZES[size], **_DEIT3, "img_size": 384} for size in ("small", "base", "large")},
    "deit3_huge_patch14_224": {**_SIZES["huge"], **_DEIT3, "patch_size": 14},
    **{f"vit_{size}_clip_224": {**options, "pre_norm": True, "norm_eps": 1e-5} for size, options in _CLIP.items()},
    **{
        f"vit_{size}_clip_quickgelu_224": {**options, **_QUICK, "num_classes": 768 if "large" in size else 512}
        for size, options in _CLIP.items()
    },
}

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _input(name: str) -> Input:
    if "_clip_quickgelu_" in name:
        return Input(mean=CLIP_MEAN, std=CLIP_STD, crop=1.0)
    if "_clip_" in name:  # of the checkpoints fine-tuned on ImageNet
        crop = {"vit_base_patch32_clip_224": 0.9, "vit_base_patch16_clip_224": 0.95}.get(name)
        return Input(mean=CLIP_MEAN, std=CLIP_STD, crop=crop) if crop else Input(mean=HALF, std=HALF, crop=1.0)
    if name.endswith("_384"):
        return Input(size=384, crop=1.0)
    return Input(mean=HALF, std=HALF, crop=0.9) if name.startswith("vit_") else Input(crop=0.9)


INPUTS = {name: _input(name) for name in VARIANTS}

_BLOCKS = (r"^blocks_(\d+)", r"blocks.\1")
NAMES = {"timm": [_BLOCKS, (r"gamma_(\d)$", r"ls\1.gamma")], "official": [_BLOCKS]}

# Parameters that timm's `no_weight_decay()` spares, as regular expressions on our paths.
NO_DECAY = (r"(^|/)(pos_embed|cls_token|dist_token)$",)
