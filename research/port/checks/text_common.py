"""Golden checks of the language models against Hugging Face's: LLaMA, OPT, BERT, RoBERTa, T5."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.language import bert, llama, opt, t5
from research.language.checkpoint import from_state
from research.language.generate import generate
from research.language.losses import next_token_loss, token_loss
from research.port.verify import Golden


def _model(golden: Golden, family, alias: str | None = None, source: str | None = None, **overrides) -> nn.Module:
    """The model of the golden's config, in float64; weights say whether `alias` is tied where the config does not."""
    if alias and "tie_word_embeddings" not in golden.kwargs:
        tied = alias not in golden.w or np.array_equal(golden.w[alias], golden.w[source])
        overrides["tie_word_embeddings"] = tied
    return family.from_config(golden.kwargs, **overrides, dtype=jnp.float64)


def _variables(golden: Golden, model: nn.Module) -> dict:
    return jax.tree.map(jnp.asarray, from_state(model, golden.w))


def _input(golden: Golden, *words: str) -> jax.Array | None:
    """The first input whose name holds all of `words`."""
    return next((jnp.asarray(v) for k, v in golden.x.items() if all(word in k for word in words)), None)


def _on_rows(golden: Golden, key: str, ours: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`ours` (B, N, V), but what is expected in the rows of padding, which the golden says not to compare."""
    return ours if mask is None else jnp.where(mask.astype(bool)[..., None], ours, golden.y[key])


def _causal(golden: Golden, family, source: str) -> dict:
    model = _model(golden, family, "lm_head.weight", source)
    variables = _variables(golden, model)
    ids, mask = jnp.asarray(golden.x["input_ids"]), golden.x.get("attention_mask")
    apply = jax.jit(lambda ids, mask: model.apply(variables, ids, mask)[0])
    found, left = {}, "logits_leftpad" in golden.y
    if left:
        padded, seen = _input(golden, "ids", "left"), _input(golden, "mask", "left")
        padded, seen = ids if padded is None else padded, mask if seen is None else seen
        found["logits_leftpad"] = _on_rows(golden, "logits_leftpad", apply(padded, seen), seen)
        mask = None if seen is mask else mask  # the only mask is that of the padded batch
    logits = apply(ids, mask)
    found["logits"] = _on_rows(golden, "logits", logits, mask)
    if "loss" in golden.y:
        found["loss"] = next_token_loss(logits, jnp.asarray(golden.x.get("labels", ids)))
    return found


def check_llama(golden: Golden) -> dict:
    """`logits_leftpad` are those of a batch padded on the left, at its real tokens."""
    return _causal(golden, llama, "model.embed_tokens.weight")


def check_opt(golden: Golden) -> dict:
    return _causal(golden, opt, "model.decoder.embed_tokens.weight")


def _bert(golden: Golden, **overrides) -> tuple:
    model = _model(golden, bert, **overrides)
    variables = _variables(golden, model)
    ids, mask, types = (_input(golden, name) for name in ("input_ids", "attention_mask", "token_type_ids"))
    return jax.jit(model.apply)(variables, ids, mask, types)


def check_bert_mlm(golden: Golden) -> dict:
    logits, endpoints = _bert(golden, head="mlm")
    return _with_loss(golden, logits, endpoints)


def _with_loss(golden: Golden, logits: jax.Array, endpoints: dict) -> dict:
    found = {"logits": logits, "last_hidden_state": endpoints["hidden"], **endpoints}
    labels = _input(golden, "labels")
    return found if labels is None else found | {"loss": token_loss(logits, labels)}


def _classifier(golden: Golden, weight: str) -> dict:
    logits, endpoints = _bert(golden, head="classify", num_labels=golden.w[weight].shape[0])
    return _with_loss(golden, logits, endpoints)


def check_bert(golden: Golden) -> dict:
    return _classifier(golden, "classifier.weight")


def check_roberta(golden: Golden) -> dict:
    return _classifier(golden, "classifier.out_proj.weight")


def check_t5(golden: Golden) -> dict:
    """Logits, loss, the encoder's states, and greedy decoding, which starts with the decoder's start token."""
    model = _model(golden, t5, "lm_head.weight", "shared.weight")
    variables = _variables(golden, model)
    ids, mask, labels = (_input(golden, name) for name in ("input_ids", "attention_mask", "labels"))
    pad = golden.kwargs.get("pad_token_id", 0)
    own = golden.x.get("decoder_input_ids")
    own = t5.shift_right(labels, model.decoder_start_token_id, pad) if own is None else jnp.asarray(own)
    logits, endpoints = jax.jit(model.apply)(variables, ids, own, mask)
    found = {"logits": logits, "encoder_last_hidden_state": endpoints["encoder_hidden"]}
    found |= {} if labels is None else {"loss": token_loss(logits, labels)}
    if "greedy" in golden.y:
        count = golden.y["greedy"].shape[1] - 1
        eos = golden.kwargs.get("eos_token_id", 1)
        written = generate(model, variables, ids, mask=mask, max_new_tokens=count, eos=eos, pad=pad)
        start = jnp.full_like(written[:, :1], model.decoder_start_token_id)
        found["greedy"] = jnp.concatenate([start, written], axis=1)
    return found


CHECKS = {
    "llama": check_llama,
    "opt": check_opt,
    "bert_seqcls": check_bert,
    "bert_mlm": check_bert_mlm,
    "roberta_seqcls": check_roberta,
    "t5": check_t5,
}
