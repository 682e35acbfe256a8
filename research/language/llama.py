"""LLaMA, and ParameterNet's form of it, whose down projections have several experts.

Sources: Touvron et al. 2023 (arXiv 2302.13971); ParameterNet, Han et al. 2024 (arXiv 2306.14525, section 3.3) and its
code. Official names are those of Hugging Face, after `research.layers.moe.stack_experts` where there are experts.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.layers.attention import attend
from research.layers.moe import SwitchDense
from research.layers.norm import accumulation_dtype

IGNORED_LABEL = -100


def rotate(x: jax.Array, base: float = 10000.0) -> jax.Array:
    """Rotary positions: x (..., N, D) with its halves taken as D/2 planes, turned by n / base^(2i/D) (RoFormer)."""
    half = x.shape[-1] // 2
    wide = accumulation_dtype(x)
    frequency = base ** (-jnp.arange(half, dtype=wide) / half)
    angle = jnp.outer(jnp.arange(x.shape[-2], dtype=wide), frequency)
    cos, sin = (f(angle).reshape(*[1] * (x.ndim - 2), *angle.shape) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def next_token_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of each token given those before it, a scalar of float32 or better.

    Args:
      logits: (B, S, V); labels: (B, S) int, the tokens themselves; where they are -100 nothing is asked.
    """
    logits, labels = logits[:, :-1].astype(accumulation_dtype(logits)), labels[:, 1:]
    asked = labels != IGNORED_LABEL
    own = jnp.where(asked, labels, 0)[..., None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), own, axis=-1)[..., 0]
    return jnp.sum(jnp.where(asked, losses, 0)) / jnp.maximum(jnp.sum(asked), 1).astype(losses.dtype)


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + epsilon)` over the last axis, in float32 or better (Zhang & Sennrich 2019)."""

    epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(accumulation_dtype(x))
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(x.dtype).reshape(*[1] * (x.ndim - 1), -1)).astype(self.dtype)


class Layer(nn.Module):
    """Causal attention and gated MLP, each normalised first and added: (B, N, C) -> (B, N, C), router logits or None.

    Fields:
      intermediate_size: width of the MLP; num_experts: of its last projection, 0 for a plain one.
    """

    intermediate_size: int
    num_heads: int
    num_experts: int = 0
    epsilon: float = 1e-6
    rope_base: float = 10000.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        norm = functools.partial(RMSNorm, self.epsilon, self.dtype)
        x = x + self._attention(norm(name="input_layernorm")(x))
        y, logits = self._mlp(norm(name="post_attention_layernorm")(x))
        return x + y, logits

    def _dense(self, features: int, name: str) -> nn.Dense:
        init = nn.initializers.normal(0.02)
        return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

    def _attention(self, x: jax.Array) -> jax.Array:
        batch, count, channels = x.shape
        heads = lambda y: y.reshape(batch, count, self.num_heads, -1).swapaxes(1, 2)
        q, k, v = (heads(self._dense(channels, f"self_attn_{name}_proj")(x)) for name in "qkv")
        lowest = jnp.finfo(accumulation_dtype(x)).min
        mask = jnp.where(jnp.tri(count, dtype=bool), 0.0, lowest).astype(accumulation_dtype(x))
        y = attend(rotate(q, self.rope_base), rotate(k, self.rope_base), v, mask)
        return self._dense(channels, "self_attn_o_proj")(y.swapaxes(1, 2).reshape(x.shape))

    def _mlp(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        gate, up = (self._dense(self.intermediate_size, f"mlp_{name}_proj")(x) for name in ("gate", "up"))
        hidden = nn.silu(gate) * up
        if not self.num_experts:
            return self._dense(x.shape[-1], "mlp_down_proj")(hidden), None
        return SwitchDense(x.shape[-1], self.num_experts, dtype=self.dtype, name="mlp_down_proj")(hidden)


class Llama(nn.Module):
    """Causal language model: tokens (B, N) int -> logits (B, N, vocab_size) and endpoints.

    Fields, as in Hugging Face's LlamaConfig; `num_experts` of every down projection, 0 for plain ones.

    Endpoints: `hidden` (B, N, C), the normalised last state, and with experts `router_logits` (B, layers * N, E), the
    layers one after the other, as `research.layers.moe.load_balancing_loss` wants them.

    Raises:
      ValueError: `hidden_size` does not divide into heads of an even width.
    """

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_experts: int = 0
    rms_norm_eps: float = 1e-6
    rope_base: float = 10000.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide into {self.num_attention_heads} heads of an even width"
            )
        init = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocab_size, self.hidden_size, dtype=self.dtype, embedding_init=init, name="embed_tokens")
        x, routers = embed(tokens), []
        for index in range(self.num_hidden_layers):
            layer = Layer(
                self.intermediate_size,
                self.num_attention_heads,
                self.num_experts,
                self.rms_norm_eps,
                self.rope_base,
                self.dtype,
                name=f"layers_{index}",
            )
            x, logits = layer(x)
            routers.append(logits)
        x = RMSNorm(self.rms_norm_eps, self.dtype, name="norm")(x)
        endpoints = {"hidden": x} | ({"router_logits": jnp.concatenate(routers, 1)} if self.num_experts else {})
        head = nn.Dense(self.vocab_size, use_bias=False, kernel_init=init, dtype=self.dtype, name="lm_head")
        return head(x), endpoints


VARIANTS = {"llama_1b": {}, "llama_1b_moe_down": {"num_experts": 8}}

NAMES = {
    "official": [
        (r"^layers_(\d+)", r"layers.\1"),
        (r"\.(self_attn|mlp)_", r".\1."),
        (r"router_classifier", "router.classifier"),
        (r"^embed_tokens\.embedding$", "embed_tokens.weight"),
        (r"^(?!lm_head)", "model."),
    ]
}
