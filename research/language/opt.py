"""OPT (Zhang et al. 2022, arXiv 2205.01068) with the layout and names of Hugging Face's OPTForCausalLM."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.language.causal import CausalModel, Shared, context_of, lookup
from research.layers.activations import activation
from research.layers.dense import Dense
from research.layers.drop import Dropout
from research.layers.multihead import Cache, KeyValues, MultiHead, empty_cache, remember
from research.layers.norm import LayerNorm

_INIT = nn.initializers.normal(0.02)
_EPSILON = 1e-5
_OFFSET = 2  # rows of the position table before that of position 0; padding, position -1, has the second


def _norm(affine: bool, dtype) -> nn.Module:
    if affine:
        return LayerNorm(_EPSILON, dtype)
    return nn.LayerNorm(_EPSILON, dtype, use_bias=False, use_scale=False, use_fast_variance=False)


class Layer(nn.Module):
    """Causal attention and MLP, each normalised before (or after its addition, in `opt_350m`); made by `block`."""

    num_heads: int
    head_dim: int
    ffn_dim: int
    norm_first: bool = True
    act: str = "relu"
    use_bias: bool = True
    affine: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.self_attn_layer_norm, self.final_layer_norm = (_norm(self.affine, self.dtype) for _ in range(2))
        options = {"use_bias": self.use_bias, "dtype": self.dtype}
        self.self_attn = MultiHead(self.num_heads, self.head_dim, dropout=self.attention_dropout, **options)
        width = self.num_heads * self.head_dim
        self.fc1, self.fc2 = (Dense(size, kernel_init=_INIT, **options) for size in (self.ffn_dim, width))
        self.drop = Dropout(self.dropout)

    def __call__(
        self, x: jax.Array, shared: Shared, past: KeyValues | None = None, train: bool = False
    ) -> tuple[jax.Array, KeyValues, None]:
        """(B, N, C) -> (B, N, C), keys and values with those of `past`, None."""
        y = self.self_attn_layer_norm(x) if self.norm_first else x
        memory = remember(past, self.self_attn.keys_values(y), shared.slots)
        x = x + self.drop(self.self_attn(y, memory, shared.bias, train=train), train)
        x = x if self.norm_first else self.self_attn_layer_norm(x)
        y = self.final_layer_norm(x) if self.norm_first else x
        x = x + self.drop(self.fc2(activation(self.act)(self.fc1(y))), train)
        return (x if self.norm_first else self.final_layer_norm(x)), memory, None


class Opt(CausalModel):
    """OPT; see `research.language.causal.CausalModel` for what it takes and gives.

    Fields are those of Hugging Face's OPTConfig. `do_layer_norm_before=False` has no final norm and
    `word_embed_proj_dim` other than `hidden_size` has projections around the layers: both are `opt_350m`.

    Raises:
      ValueError: `hidden_size` does not divide into heads; more tokens (or slots of a cache) than positions.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    ffn_dim: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    final_norm: bool = True
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} does not divide into {self.num_attention_heads} heads")
        width = self.word_embed_proj_dim or self.hidden_size
        table = {"dtype": self.dtype, "embedding_init": _INIT}
        self.embed_tokens = nn.Embed(self.vocab_size, width, **table)
        self.embed_positions = nn.Embed(self.max_position_embeddings + _OFFSET, self.hidden_size, **table)
        plain = {"use_bias": False, "kernel_init": _INIT, "dtype": self.dtype}
        if width != self.hidden_size:
            self.project_in, self.project_out = Dense(self.hidden_size, **plain), Dense(width, **plain)
        self.layers = [block(self) for _ in range(self.num_hidden_layers)]
        if self.do_layer_norm_before and self.final_norm:
            self.final_layer_norm = _norm(self.layer_norm_elementwise_affine, self.dtype)
        if not self.tie_word_embeddings:
            self.lm_head = Dense(self.vocab_size, **plain)

    def embed(self, tokens: jax.Array, mask: jax.Array | None = None, cache: Cache | None = None):
        positions, bias, slots, noted = context_of(tokens, mask, cache, self.dtype)
        if bias.shape[-1] > self.max_position_embeddings:
            raise ValueError(
                f"{bias.shape[-1]} tokens, but max_position_embeddings={self.max_position_embeddings}: shorten the text"
            )
        x = lookup(self.embed_tokens, tokens)
        x = self.project_in(x) if x.shape[-1] != self.hidden_size else x
        return x + self.embed_positions(positions + _OFFSET), Shared(bias, slots), noted

    def finish(self, x: jax.Array) -> jax.Array:
        x = self.final_layer_norm(x) if self.do_layer_norm_before and self.final_norm else x
        width = self.word_embed_proj_dim or self.hidden_size
        return self.project_out(x) if width != self.hidden_size else x

    def head(self, x: jax.Array) -> jax.Array:
        return self.embed_tokens.attend(x) if self.tie_word_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        heads = self.num_attention_heads
        return empty_cache(self.num_hidden_layers, batch, heads, slots, self.hidden_size // heads, self.dtype)


def block(model: Opt) -> Layer:
    """One layer of `model`, with no parameters of its own: they are `params["layers_<i>"]` of the model's."""
    return Layer(
        model.num_attention_heads,
        model.hidden_size // model.num_attention_heads,
        model.ffn_dim,
        model.do_layer_norm_before,
        model.activation_function,
        model.enable_bias,
        model.layer_norm_elementwise_affine,
        model.dropout,
        model.attention_dropout,
        model.dtype,
    )


def build(**arguments) -> Opt:
    return Opt(**arguments)


CONFIG = tuple(name for name in Opt.__dataclass_fields__ if name not in ("final_norm", "dtype", "parent", "name"))


def from_config(config: Mapping, **overrides) -> Opt:
    """The model of a Hugging Face OPTConfig as a dict, whose missing keys have the library's defaults."""
    kept = {name: config[name] for name in CONFIG if config.get(name) is not None}
    return build(**{**kept, "final_norm": not config.get("_remove_final_layer_norm", False), **overrides})


def to_config(model: Opt) -> dict:
    """The inverse of `from_config`."""
    config = {name: getattr(model, name) for name in CONFIG}
    config |= {"word_embed_proj_dim": model.word_embed_proj_dim or model.hidden_size}
    config |= {"_remove_final_layer_norm": not model.final_norm}
    return {"architectures": ["OPTForCausalLM"], "model_type": "opt", **config}


def _size(layers: int, hidden: int, heads: int, **more) -> dict:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "ffn_dim": 4 * hidden, "num_attention_heads": heads}
    return {**sizes, **more}


VARIANTS = {
    "opt_125m": _size(12, 768, 12),
    "opt_350m": _size(24, 1024, 16, do_layer_norm_before=False, word_embed_proj_dim=512),
    "opt_1.3b": _size(24, 2048, 32),
    "opt_2.7b": _size(32, 2560, 32),
    "opt_6.7b": _size(32, 4096, 32),
    "opt_13b": _size(40, 5120, 40),
    "opt_30b": _size(48, 7168, 56),
    "opt_66b": _size(64, 9216, 72),
}

NAMES = {
    "official": [
        (r"^layers_(\d+)", r"layers.\1"),
        (r"\.o_proj\.", ".out_proj."),
        (r"\.embedding$", ".weight"),
        (r"^(?!lm_head)", "model.decoder."),
    ]
}
IGNORED = ()


def aliases(model: Opt) -> dict[str, str]:
    """Names under which official files may repeat a parameter -> the parameter's own name."""
    return {"lm_head.weight": "model.decoder.embed_tokens.weight"} if model.tie_word_embeddings else {}
