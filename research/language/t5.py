"""T5 (Raffel et al. 2020, arXiv 1910.10683), v1.0 and v1.1, with the names of T5ForConditionalGeneration."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.language.causal import lookup
from research.language.losses import IGNORED_LABEL
from research.layers.activations import activation
from research.layers.bucket_bias import BucketBias
from research.layers.dense import Dense
from research.layers.drop import Dropout
from research.layers.multihead import Cache, KeyValues, MultiHead, causal_context, empty_cache, mask_bias, remember
from research.layers.rms_norm import RMSNorm

_PROJECTION = re.compile(r"(gated-)?(\w+)")


class Sizes(NamedTuple):
    """What the layers of both stacks have in common; fields as in Hugging Face's T5Config."""

    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    buckets: int
    max_distance: int
    dropout: float
    epsilon: float
    feed_forward_proj: str
    dtype: jnp.dtype


class Recall(NamedTuple):
    """What the decoder remembers: its own past, and of each layer the keys and values of the encoder's states.

    Fields:
      own: of the decoder's tokens; cross: one a layer; bias: (B, 1, 1, N), hides the encoder's padding.
    """

    own: Cache
    cross: tuple[KeyValues, ...]
    bias: jax.Array


def _normal(std: float):
    return nn.initializers.normal(std)


class Mlp(nn.Module):
    """`wo(act(wi x))`, or with `feed_forward_proj="gated-..."` `wo(act(wi_0 x) * wi_1 x)`: (B, N, C) -> (B, N, C)."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        found = _PROJECTION.fullmatch(self.sizes.feed_forward_proj)
        act = activation("gelu_new" if found[1] and found[2] == "gelu" else found[2])
        dense = lambda size, inputs, name: Dense(
            size, use_bias=False, kernel_init=_normal(inputs**-0.5), dtype=self.sizes.dtype, name=name
        )
        width, hidden = self.sizes.d_model, self.sizes.d_ff
        if found[1]:
            y = act(dense(hidden, width, "wi_0")(x)) * dense(hidden, width, "wi_1")(x)
        else:
            y = act(dense(hidden, width, "wi")(x))
        return dense(width, hidden, "wo")(Dropout(self.sizes.dropout)(y, train))


class Block(nn.Module):
    """Self-attention, in the decoder attention to the encoder, and MLP, each normalised first and added."""

    sizes: Sizes
    decoder: bool = False

    def setup(self):
        s = self.sizes
        norm = lambda: RMSNorm(s.epsilon, s.dtype)
        attention = lambda: MultiHead(
            s.num_heads,
            s.d_kv,
            scaled=False,
            dropout=s.dropout,
            kernel_init=_normal(s.d_model**-0.5),
            query_init=_normal((s.d_model * s.d_kv) ** -0.5),
            out_init=_normal((s.num_heads * s.d_kv) ** -0.5),
            dtype=s.dtype,
        )
        self.self_norm, self.self_attn, self.mlp_norm, self.mlp = norm(), attention(), norm(), Mlp(s)
        if self.decoder:
            self.cross_norm, self.cross_attn = norm(), attention()
        self.drop = Dropout(s.dropout)

    def cross_memory(self, encoded: jax.Array) -> KeyValues:
        """Keys and values of the encoder's states (B, N, C)."""
        return self.cross_attn.keys_values(encoded)

    def __call__(self, x, bias, slots=None, past=None, memory=None, memory_bias=None, train: bool = False):
        """(B, M, C) -> (B, M, C), and keys and values with those of `past`."""
        y = self.self_norm(x)
        own = remember(past, self.self_attn.keys_values(y), slots)
        x = x + self.drop(self.self_attn(y, own, bias, train=train), train)
        if self.decoder:
            y = self.cross_attn(self.cross_norm(x), memory, memory_bias, train=train)
            x = x + self.drop(y, train)
        return x + self.drop(self.mlp(self.mlp_norm(x), train), train), own


class Stack(nn.Module):
    """The encoder, or the decoder: embeddings (B, M, C) -> normalised states (B, M, C), list of keys and values."""

    sizes: Sizes
    depth: int
    decoder: bool = False

    def setup(self):
        s = self.sizes
        self.relative_bias = BucketBias(
            s.num_heads, s.buckets, s.max_distance, not self.decoder, _normal(s.d_model**-0.5)
        )
        self.block = [Block(s, self.decoder) for _ in range(self.depth)]
        self.final_layer_norm = RMSNorm(s.epsilon, s.dtype)
        self.drop = Dropout(s.dropout)

    def cross_memories(self, encoded: jax.Array) -> tuple[KeyValues, ...]:
        """Keys and values of the encoder's states (B, N, C), one pair a block."""
        return tuple(block.cross_memory(encoded) for block in self.block)

    def __call__(self, x, visible, slots, pasts=None, memories=None, memory_bias=None, train: bool = False):
        """`visible` (B or 1, 1, M or 1, N) bool; queries stand at `slots` (M,), keys at 0 to N - 1."""
        keys = jnp.arange(visible.shape[-1], dtype=jnp.int32)
        position = self.relative_bias(slots, keys)[None]
        hidden = mask_bias(visible, self.sizes.dtype)
        # The sum is made of numbers and the mask, so only one of its terms may be the most negative number.
        bias = jnp.where(visible, position.astype(hidden.dtype), hidden)
        x, pairs = self.drop(x, train), []
        for index, block in enumerate(self.block):
            past, memory = (None if many is None else many[index] for many in (pasts, memories))
            x, pair = block(x, bias, slots, past, memory, memory_bias, train)
            pairs.append(pair)
        return self.drop(self.final_layer_norm(x), train), tuple(pairs)


class T5(nn.Module):
    """Encoder and decoder of text: tokens (B, N) and decoder tokens (B, M) int -> logits (B, M, vocab_size), endpoints.

    Fields are those of Hugging Face's T5Config; `feed_forward_proj` is an activation, or `gated-` and one (v1.1).

    Endpoints: `encoder_hidden` (B, N, C); `hidden` (B, M, C), the decoder's normalised state.

    Raises:
      ValueError: a `feed_forward_proj` that names no activation.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    decoder_start_token_id: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if not _PROJECTION.fullmatch(self.feed_forward_proj):
            raise ValueError(f"feed_forward_proj={self.feed_forward_proj!r} is no activation and no gated- with one")
        sizes = Sizes(
            self.d_model,
            self.d_kv,
            self.d_ff,
            self.num_heads,
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
            self.dropout_rate,
            self.layer_norm_epsilon,
            self.feed_forward_proj,
            self.dtype,
        )
        self.shared = nn.Embed(self.vocab_size, self.d_model, dtype=self.dtype, embedding_init=_normal(1.0))
        self.encoder = Stack(sizes, self.num_layers)
        self.decoder = Stack(sizes, self.num_decoder_layers or self.num_layers, decoder=True)
        if not self.tie_word_embeddings:
            self.lm_head = Dense(self.vocab_size, use_bias=False, kernel_init=_normal(1.0), dtype=self.dtype)

    def __call__(
        self,
        tokens: jax.Array,
        decoder_tokens: jax.Array,
        mask: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and endpoints.

        Args:
          tokens: (B, N) int, or embeddings (B, N, C) in their place; decoder_tokens: the same, of the decoder; see
            `shift_right`.
          mask: (B, N), true or 1 where one of `tokens` is none of padding; None: all are real.
          train: dropout, rng stream `dropout`.
        """
        encoded = self.encode(tokens, mask, train)
        context, _ = causal_context(decoder_tokens.shape[1])
        hidden, _ = self.decoder(
            lookup(self.shared, decoder_tokens),
            context.visible,
            context.slots,
            memories=self.decoder.cross_memories(encoded),
            memory_bias=self._memory_bias(mask),
            train=train,
        )
        return self.head(hidden), {"encoder_hidden": encoded, "hidden": hidden}

    def encode(self, tokens: jax.Array, mask: jax.Array | None = None, train: bool = False) -> jax.Array:
        """The encoder's states (B, N, C); arguments as of the call."""
        count = tokens.shape[1]
        visible = jnp.ones((1, 1, 1, count), bool) if mask is None else mask.astype(bool)[:, None, None, :]
        order = jnp.arange(count, dtype=jnp.int32)
        return self.encoder(lookup(self.shared, tokens), visible, order, train=train)[0]

    def head(self, x: jax.Array) -> jax.Array:
        """Logits of the decoder's states."""
        return self.shared.attend(x * self.d_model**-0.5) if self.tie_word_embeddings else self.lm_head(x)

    def _memory_bias(self, mask: jax.Array | None) -> jax.Array | None:
        return None if mask is None else mask_bias(mask.astype(bool)[:, None, None, :], self.dtype)

    def start(self, tokens: jax.Array, mask: jax.Array | None, slots: int) -> tuple[jax.Array, Recall]:
        """Reads texts (B, N): logits (B, V) of the decoder's first token, and room for `slots` of its tokens."""
        encoded, batch = self.encode(tokens, mask), tokens.shape[0]
        depth = self.num_decoder_layers or self.num_layers
        own = empty_cache(depth, batch, self.num_heads, slots + 1, self.d_kv, self.dtype)
        bias = self._memory_bias(jnp.ones(encoded.shape[:2], bool) if mask is None else mask)
        recall = Recall(own, self.decoder.cross_memories(encoded), bias)
        return self.advance(jnp.full((batch,), self.decoder_start_token_id, jnp.int32), recall)

    def advance(self, tokens: jax.Array, recall: Recall) -> tuple[jax.Array, Recall]:
        """Reads one more token of each decoder, (B,) int: logits (B, V) of what follows, and what is remembered."""
        context, own = causal_context(1, cache=recall.own)
        x = lookup(self.shared, tokens[:, None])
        pasts = recall.own.layers
        x, pairs = self.decoder(x, context.visible, context.slots, pasts, recall.cross, recall.bias)
        return self.head(x[:, -1]), recall._replace(own=own._replace(layers=pairs))


def shift_right(labels: jax.Array, start: int = 0, pad: int = 0) -> jax.Array:
    """The decoder's tokens for `labels` (B, M): `start`, then the labels but the last, with -100 read as `pad`."""
    first = jnp.full_like(labels[:, :1], start)
    kept = jnp.where(labels[:, :-1] == IGNORED_LABEL, jnp.asarray(pad, labels.dtype), labels[:, :-1])
    return jnp.concatenate([first, kept], axis=1)


def build(**arguments) -> T5:
    return T5(**arguments)


CONFIG = tuple(name for name in T5.__dataclass_fields__ if name not in ("dtype", "parent", "name"))


def from_config(config: Mapping, **overrides) -> T5:
    """The model of a Hugging Face T5Config as a dict, whose missing keys have the library's defaults."""
    return build(**{**{name: config[name] for name in CONFIG if config.get(name) is not None}, **overrides})


def to_config(model: T5) -> dict:
    """The inverse of `from_config`."""
    config = {name: getattr(model, name) for name in CONFIG if getattr(model, name) is not None}
    return {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True, **config}


def _size(layers: int, width: int, heads: int, hidden: int, **more) -> dict:
    return {"num_layers": layers, "d_model": width, "num_heads": heads, "d_ff": hidden, **more}


_V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
VARIANTS = {
    "t5_small": _size(6, 512, 8, 2048),
    "t5_base": _size(12, 768, 12, 3072),
    "t5_large": _size(24, 1024, 16, 4096),
    "t5_v1_1_small": _size(8, 512, 6, 1024, **_V1_1),
    "t5_v1_1_base": _size(12, 768, 12, 2048, **_V1_1),
    "t5_v1_1_large": _size(24, 1024, 16, 2816, **_V1_1),
}

NAMES = {
    "official": [
        (r"\.block_(\d+)", r".block.\1"),
        (r"\.self_attn\.", ".layer.0.SelfAttention."),
        (r"\.self_norm\.", ".layer.0.layer_norm."),
        (r"\.cross_attn\.", ".layer.1.EncDecAttention."),
        (r"\.cross_norm\.", ".layer.1.layer_norm."),
        (r"^(encoder.*)\.mlp\.", r"\1.layer.1.DenseReluDense."),
        (r"^(encoder.*)\.mlp_norm\.", r"\1.layer.1.layer_norm."),
        (r"^(decoder.*)\.mlp\.", r"\1.layer.2.DenseReluDense."),
        (r"^(decoder.*)\.mlp_norm\.", r"\1.layer.2.layer_norm."),
        (r"Attention\.([qkvo])_proj\.", r"Attention.\1."),
        (r"\.relative_bias\.", ".block.0.layer.0.SelfAttention.relative_attention_bias."),
        (r"\.embedding$", ".weight"),
    ]
}
# Files of the first release hold a bias of attention to the encoder that nothing reads.
IGNORED = (r"EncDecAttention\.relative_attention_bias\.weight$",)


def aliases(model: T5) -> dict[str, str]:
    """Names under which official files may repeat a parameter -> the parameter's own name."""
    names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    return dict.fromkeys(names + ["lm_head.weight"] * model.tie_word_embeddings, "shared.weight")
