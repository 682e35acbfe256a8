"""BERT and RoBERTa: encoders of text, with a classifier or a head that fills in masked tokens.

Sources: Devlin et al. 2019 (arXiv 1810.04805); Liu et al. 2019 (arXiv 1907.11692). Layout and names are those of
Hugging Face's Bert/RobertaForSequenceClassification and Bert/RobertaForMaskedLM.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.language.causal import lookup
from research.layers.activations import activation
from research.layers.dense import Dense
from research.layers.drop import Dropout
from research.layers.mlp import gelu
from research.layers.multihead import MultiHead, mask_bias
from research.layers.norm import LayerNorm

_INIT = nn.initializers.normal(0.02)
HEADS = ("classify", "mlm", "none")


def _padded_init(pad: int):
    """Normal rows, but a zero one for padding, as PyTorch's embedding has it."""
    return lambda key, shape, dtype=jnp.float32: _INIT(key, shape, dtype).at[pad].set(0)


def positions_of(tokens: jax.Array, pad: int) -> jax.Array:
    """RoBERTa's positions of `tokens` (B, N) int: `pad` + 1, `pad` + 2, ... over real tokens, `pad` for padding.

    Embeddings (B, N, C) in their place have no padding.
    """
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        return jnp.arange(pad + 1, pad + 1 + tokens.shape[1], dtype=jnp.int32)[None]
    real = (tokens != pad).astype(jnp.int32)
    return jnp.cumsum(real, axis=1, dtype=jnp.int32) * real + pad


class Embeddings(nn.Module):
    """Sum of word, type and position embeddings, normalised: (B, N) -> (B, N, C). `table` is the words'."""

    vocab_size: int
    hidden_size: int
    max_positions: int
    types: int
    pad: int
    roberta: bool
    epsilon: float
    dropout: float
    dtype: jnp.dtype

    def setup(self):
        embed = lambda rows, init: nn.Embed(rows, self.hidden_size, dtype=self.dtype, embedding_init=init)
        self.word_embeddings = embed(self.vocab_size, _padded_init(self.pad))
        self.position_embeddings = embed(self.max_positions, _padded_init(self.pad) if self.roberta else _INIT)
        self.token_type_embeddings = embed(self.types, _INIT)
        self.LayerNorm = LayerNorm(self.epsilon, self.dtype)
        self.drop = Dropout(self.dropout)

    def __call__(self, tokens: jax.Array, types: jax.Array | None, train: bool) -> jax.Array:
        count = tokens.shape[1]
        allowed = self.max_positions - (self.pad + 1 if self.roberta else 0)
        if count > allowed:
            raise ValueError(f"{count} tokens, but there are {allowed} positions: shorten the text")
        order = jnp.arange(count, dtype=jnp.int32)[None]
        positions = positions_of(tokens, self.pad) if self.roberta else order
        x = lookup(self.word_embeddings, tokens)
        x = x + self.token_type_embeddings(jnp.zeros_like(order) if types is None else types)
        return self.drop(self.LayerNorm(x + self.position_embeddings(positions)), train)

    def attend(self, x: jax.Array) -> jax.Array:
        """Scores of all words, (..., C) -> (..., vocab_size)."""
        return self.word_embeddings.attend(x)


class Layer(nn.Module):
    """Attention and MLP, each added and then normalised: (B, N, C) -> (B, N, C)."""

    num_heads: int
    intermediate_size: int
    act: str = "gelu"
    epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None = None, train: bool = False) -> jax.Array:
        width = x.shape[-1]
        dense = lambda size, name: Dense(size, kernel_init=_INIT, dtype=self.dtype, name=name)
        norm = lambda name: LayerNorm(self.epsilon, self.dtype, name=name)
        attention = MultiHead(
            self.num_heads,
            width // self.num_heads,
            use_bias=True,
            dropout=self.attention_dropout,
            dtype=self.dtype,
            name="attention",
        )
        y = attention(x, attention.keys_values(x), bias, train=train)
        x = norm("attention_norm")(x + Dropout(self.dropout)(y, train))
        y = dense(width, "output")(activation(self.act)(dense(self.intermediate_size, "intermediate")(x)))
        return norm("output_norm")(x + Dropout(self.dropout)(y, train))


class Bert(nn.Module):
    """Encoder of text: tokens (B, N) int -> (logits, endpoints).

    Fields are those of Hugging Face's BertConfig, and
      roberta: positions follow the tokens and start after `pad_token_id`; the classifier has a layer more, no pooler.
      head: `classify` (num_labels logits of the first token), `mlm` (vocab_size of every token), or `none`.

    Endpoints: `hidden_0` (embeddings) to `hidden_L` (B, N, C), the state after each layer; `hidden`, the last; `pooled`
    (B, C), what the classifier's last layer sees.

    Raises:
      ValueError: heads that do not divide `hidden_size`, an unknown head, more tokens than positions.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    roberta: bool = False
    head: str = "classify"
    num_labels: int = 2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        types: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits and endpoints; with head `none` the last state in the place of logits.

        Args:
          tokens: (B, N) int, or word embeddings (B, N, C) in their place.
          mask: (B, N), true or 1 where a token is none of padding; None: all are real.
          types: (B, N) int, the sentence a token belongs to; None: the first.
          train: dropout, rng stream `dropout`.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r} is none of {', '.join(HEADS)}")
        embeddings = Embeddings(
            self.vocab_size,
            self.hidden_size,
            self.max_position_embeddings,
            self.type_vocab_size,
            self.pad_token_id,
            self.roberta,
            self.layer_norm_eps,
            self.hidden_dropout_prob,
            self.dtype,
            name="embeddings",
        )
        x = embeddings(tokens, types, train)
        bias = None if mask is None else mask_bias(mask.astype(bool)[:, None, None, :], self.dtype)
        endpoints = {"hidden_0": x}
        for index in range(self.num_hidden_layers):
            layer = Layer(
                self.num_attention_heads,
                self.intermediate_size,
                self.hidden_act,
                self.layer_norm_eps,
                self.hidden_dropout_prob,
                self.attention_probs_dropout_prob,
                self.dtype,
                name=f"layer_{index}",
            )
            endpoints[f"hidden_{index + 1}"] = x = layer(x, bias, train)
        endpoints["hidden"] = x
        if self.head == "classify":
            return self._classified(x[:, 0], endpoints, train)
        return (self._filled(x, embeddings) if self.head == "mlm" else x), endpoints

    def _dense(self, size: int, name: str) -> nn.Module:
        return Dense(size, kernel_init=_INIT, dtype=self.dtype, name=name)

    def _classified(self, x: jax.Array, endpoints: dict, train: bool):
        rate = self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout
        drop = Dropout(rate)
        x = drop(x, train) if self.roberta else x
        endpoints["pooled"] = x = jnp.tanh(self._dense(self.hidden_size, "pooler")(x))
        return self._dense(self.num_labels, "classifier")(drop(x, train)), endpoints

    def _filled(self, x: jax.Array, embeddings: Embeddings) -> jax.Array:
        act = gelu if self.roberta else activation(self.hidden_act)
        x = act(self._dense(self.hidden_size, "transform")(x))
        logits = embeddings.attend(LayerNorm(self.layer_norm_eps, self.dtype, name="transform_norm")(x))
        bias = self.param("mlm_bias", nn.initializers.zeros, (self.vocab_size,))
        return logits + bias.astype(logits.dtype).reshape(1, 1, -1)


def build(**arguments) -> Bert:
    return Bert(**arguments)


_OWN = ("roberta", "head", "num_labels", "dtype", "parent", "name")
CONFIG = tuple(name for name in Bert.__dataclass_fields__ if name not in _OWN)
_ROBERTA_DEFAULTS = {"vocab_size": 50265, "pad_token_id": 1}
_CLASSES = {"ForMaskedLM": "mlm", "ForPreTraining": "mlm", "Model": "none"}


def from_config(config: Mapping, **overrides) -> Bert:
    """The model of a Hugging Face BertConfig or RobertaConfig as a dict, missing keys having the library's defaults.

    The head is that of the first of `architectures`, a classifier where there is none.

    Raises:
      ValueError: positions other than absolute ones, or a decoder.
    """
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise ValueError("BERT is supported with position_embedding_type=absolute and without is_decoder")
    roberta = config.get("model_type") == "roberta"
    kept = {name: config[name] for name in CONFIG if config.get(name) is not None}
    kept = {**(_ROBERTA_DEFAULTS if roberta else {}), **kept, "roberta": roberta}
    kind = (config.get("architectures") or [""])[0]
    head = next((head for end, head in _CLASSES.items() if kind.endswith(end)), "classify")
    labels = config.get("num_labels") or len(config.get("id2label") or "ab")
    return build(**{**kept, "head": head, "num_labels": labels, **overrides})


def to_config(model: Bert) -> dict:
    """The inverse of `from_config`."""
    end = {"mlm": "ForMaskedLM", "none": "Model", "classify": "ForSequenceClassification"}[model.head]
    config = {name: getattr(model, name) for name in CONFIG}
    labels = {str(index): f"LABEL_{index}" for index in range(model.num_labels)}
    config |= {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}
    kind = "roberta" if model.roberta else "bert"
    return {"architectures": [f"{kind.capitalize()}{end}"], "model_type": kind, **config}


_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_ROBERTA = {
    **_ROBERTA_DEFAULTS,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "roberta": True,
}

VARIANTS = {
    "bert_base_uncased": {},
    "bert_base_cased": {"vocab_size": 28996},
    "bert_large_uncased": _LARGE,
    "roberta_base": _ROBERTA,
    "roberta_large": {**_ROBERTA, **_LARGE},
}

_ENCODER = [
    (r"^layer_(\d+)", r"encoder.layer.\1"),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention_norm\.", ".attention.output.LayerNorm."),
    (r"\.(q)_proj\.", ".self.query."),
    (r"\.(k)_proj\.", ".self.key."),
    (r"\.(v)_proj\.", ".self.value."),
    (r"(layer\.\d+\.)(intermediate|output)\.(?!dense|LayerNorm)", r"\1\2.dense."),
    (r"\.output_norm\.", ".output.LayerNorm."),
    (r"\.embedding$", ".weight"),
]
NAMES = {
    "bert": [
        *_ENCODER,
        (r"^pooler\.", "pooler.dense."),
        (r"^transform\.", "cls.predictions.transform.dense."),
        (r"^transform_norm\.", "cls.predictions.transform.LayerNorm."),
        (r"^mlm_bias$", "cls.predictions.bias"),
        (r"^(?!cls\.|classifier\.)", "bert."),
    ],
    "roberta": [
        *_ENCODER,
        (r"^pooler\.", "classifier.dense."),
        (r"^classifier\.(?!dense\.)", "classifier.out_proj."),
        (r"^transform\.", "lm_head.dense."),
        (r"^transform_norm\.", "lm_head.layer_norm."),
        (r"^mlm_bias$", "lm_head.bias"),
        (r"^(?!lm_head\.|classifier\.)", "roberta."),
    ],
}
IGNORED = (r"embeddings\.position_ids$",)
# Heads, those of other tasks among them; the pooler is made anew only where a file has none.
HEAD_NAMES = (r"^(cls|classifier|lm_head)\.", r"^(bert|roberta)\.pooler\.")
RENAMED = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))  # of 2018


def aliases(model: Bert) -> dict[str, str]:
    """Names under which official files may repeat a parameter -> the parameter's own name."""
    if model.head != "mlm":
        return {}
    head, body = ("lm_head", "roberta") if model.roberta else ("cls.predictions", "bert")
    words = f"{body}.embeddings.word_embeddings.weight"
    return {f"{head}.decoder.weight": words, f"{head}.decoder.bias": f"{head}.bias"}
