"""LLaMA, and ParameterNet's form of it, whose down projections have several experts.

Sources: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288); ParameterNet, Han et al. 2024 (arXiv 2306.14525, section
3.3) and its code. Official names are those of Hugging Face, after `research.layers.moe.stack_experts` where there are
experts.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.language.causal import CausalModel, Shared, context_of, lookup
from research.layers.activations import activation
from research.layers.dense import Dense
from research.layers.moe import SwitchDense
from research.layers.multihead import Cache, KeyValues, MultiHead, empty_cache, remember
from research.layers.rms_norm import RMSNorm
from research.layers.rope import frequencies, rotation

_INIT = nn.initializers.normal(0.02)


class GatedMlp(nn.Module):
    """`down(act(gate(x)) * up(x))`: (B, N, C) -> (B, N, C), router logits (B, N, E) or None (Shazeer 2020)."""

    hidden: int
    act: str = "silu"
    use_bias: bool = False
    num_experts: int = 0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        dense = functools.partial(Dense, use_bias=self.use_bias, kernel_init=_INIT, dtype=self.dtype)
        gate, up = (dense(self.hidden, name=f"{name}_proj")(x) for name in ("gate", "up"))
        y = activation(self.act)(gate) * up
        if not self.num_experts:
            return dense(x.shape[-1], name="down_proj")(y), None
        return SwitchDense(x.shape[-1], self.num_experts, dtype=self.dtype, name="down_proj")(y)


class Layer(nn.Module):
    """Causal attention and gated MLP, each normalised first and added; one layer of a `Llama`, made by `block`."""

    num_heads: int
    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    num_experts: int = 0
    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        norm = functools.partial(RMSNorm, self.epsilon, self.dtype)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = MultiHead(
            self.num_heads, self.head_dim, self.num_kv_heads, use_bias=self.attention_bias, dtype=self.dtype
        )
        self.mlp = GatedMlp(self.intermediate_size, self.hidden_act, self.mlp_bias, self.num_experts, self.dtype)

    def __call__(
        self, x: jax.Array, shared: Shared, past: KeyValues | None = None, train: bool = False
    ) -> tuple[jax.Array, KeyValues, jax.Array | None]:
        """(B, N, C) -> (B, N, C), keys and values with those of `past`, router logits (B, N, E) or None."""
        y = self.input_layernorm(x)
        memory = remember(past, self.self_attn.keys_values(y, shared.rotation), shared.slots)
        x = x + self.self_attn(y, memory, shared.bias, shared.rotation)
        y, router = self.mlp(self.post_attention_layernorm(x))
        return x + y, memory, router


class Llama(CausalModel):
    """LLaMA; see `research.language.causal.CausalModel` for what it takes and gives.

    Fields are those of Hugging Face's LlamaConfig. `rope_scaling` is a tuple of its (key, value) pairs, see
    `research.layers.rope.frequencies`; `num_experts` of every down projection, 0 for plain ones (ParameterNet).

    With experts there is the endpoint `router_logits` (B, layers * N, E), the layers one after the other, as
    `research.layers.moe.load_balancing_loss` wants them.

    Raises:
      ValueError: `hidden_size` does not divide into heads of an even width.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide into {self.num_attention_heads} heads of an even width"
            )
        self.embed_tokens = nn.Embed(self.vocab_size, self.hidden_size, dtype=self.dtype, embedding_init=_INIT)
        self.layers = [block(self) for _ in range(self.num_hidden_layers)]
        self.norm = RMSNorm(self.rms_norm_eps, self.dtype)
        if not self.tie_word_embeddings:
            self.lm_head = Dense(self.vocab_size, use_bias=False, kernel_init=_INIT, dtype=self.dtype)

    def embed(self, tokens: jax.Array, mask: jax.Array | None = None, cache: Cache | None = None):
        positions, bias, slots, noted = context_of(tokens, mask, cache, self.dtype)
        frequency = frequencies(_head_dim(self), self.rope_theta, dict(self.rope_scaling))
        return lookup(self.embed_tokens, tokens), Shared(bias, slots, rotation(positions, frequency)), noted

    def finish(self, x: jax.Array) -> jax.Array:
        return self.norm(x)

    def head(self, x: jax.Array) -> jax.Array:
        return self.embed_tokens.attend(x) if self.tie_word_embeddings else self.lm_head(x)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        heads = self.num_key_value_heads or self.num_attention_heads
        return empty_cache(self.num_hidden_layers, batch, heads, slots, _head_dim(self), self.dtype)


def _head_dim(model: Llama) -> int:
    return model.head_dim or model.hidden_size // model.num_attention_heads


def block(model: Llama) -> Layer:
    """One layer of `model`, with no parameters of its own: they are `params["layers_<i>"]` of the model's."""
    return Layer(
        model.num_attention_heads,
        _head_dim(model),
        model.num_key_value_heads or model.num_attention_heads,
        model.intermediate_size,
        model.hidden_act,
        model.attention_bias,
        model.mlp_bias,
        model.num_experts,
        model.rms_norm_eps,
        model.dtype,
    )


def build(**arguments) -> Llama:
    return Llama(**arguments)


CONFIG = tuple(name for name in Llama.__dataclass_fields__ if name not in ("num_experts", "dtype", "parent", "name"))


def from_config(config: Mapping, **overrides) -> Llama:
    """The model of a Hugging Face LlamaConfig as a dict, whose missing keys have the library's defaults.

    Raises:
      ValueError: a form of `rope_scaling` that is not known.
    """
    rope = dict(config.get("rope_parameters") or {})  # where transformers 5 has both numbers
    config = {**config, **({"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {})}
    scaling = {key: value for key, value in (rope or config.get("rope_scaling") or {}).items() if value is not None}
    frequencies(2, scaling=scaling)
    kept = {name: config[name] for name in CONFIG if config.get(name) is not None}
    return build(**{**kept, "rope_scaling": tuple(sorted(scaling.items())), **overrides})


def to_config(model: Llama) -> dict:
    """The inverse of `from_config`."""
    config = {name: getattr(model, name) for name in CONFIG} | {"rope_scaling": dict(model.rope_scaling) or None}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}


_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12, "num_attention_heads": 16}


def _size(layers: int, hidden: int, intermediate: int, heads: int, **more) -> dict:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    return {**sizes, "num_attention_heads": heads, **more}


VARIANTS = {
    "llama_1b": _1B,
    "llama_1b_moe_down": {**_1B, "num_experts": 8},
    "llama_7b": _size(32, 4096, 11008, 32),
    "llama_13b": _size(40, 5120, 13824, 40),
    "llama_30b": _size(60, 6656, 17920, 52),
    "llama_65b": _size(80, 8192, 22016, 64),
    "llama2_7b": _size(32, 4096, 11008, 32, rms_norm_eps=1e-5),
    "llama2_13b": _size(40, 5120, 13824, 40, rms_norm_eps=1e-5),
    "llama2_70b": _size(80, 8192, 28672, 64, num_key_value_heads=8, rms_norm_eps=1e-5),
}

NAMES = {
    "official": [
        (r"^layers_(\d+)", r"layers.\1"),
        (r"router_classifier", "router.classifier"),
        (r"\.embedding$", ".weight"),
        (r"^(?!lm_head)", "model."),
    ]
}
IGNORED = (r"rotary_emb\.inv_freq$",)


def aliases(model: Llama) -> dict[str, str]:
    """Names under which official files may repeat a parameter -> the parameter's own name."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_word_embeddings else {}
