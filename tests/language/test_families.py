"""OPT, BERT, RoBERTa, T5: exact counts, forms no open golden has, dropout. Most numbers are checked by tests/port."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import language
from research.language import bert, opt, t5

COUNTS = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "text_common" / "counts.json").read_text())
HEADS = {" (seqcls 2)": {"head": "classify"}, " (mlm)": {"head": "mlm"}}


def count(model):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(language.shapes(model)))


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_exact(name):
    """All layers of a stack are alike, so two depths tell the parameters of any."""
    variant, options = name, {}
    for end, head in HEADS.items():
        if name.endswith(end):
            variant, options = name.removesuffix(end), head
    model = language.create(variant.replace("-", "_"), **options)
    depth = "num_layers" if isinstance(model, t5.T5) else "num_hidden_layers"
    one, two = (count(model.clone(**{depth: n})) for n in (1, 2))
    assert one + (getattr(model, depth) - 1) * (two - one) == COUNTS[name]["params"]


def drawn(model):
    """Variables in which every part matters: small numbers beside the initial ones."""
    keys = iter(range(10**6))
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(next(keys)), x.shape)
    return jax.jit(lambda key: jax.tree.map(noise, language.init(model, key)))(jax.random.key(0))


class Weights:
    """Parameters as NumPy functions, for networks of one token, whose attention is a matrix."""

    def __init__(self, params):
        self.params = jax.tree.map(np.asarray, params)

    def __getitem__(self, name):
        return Weights(self.params[name])

    def dense(self, x):
        return x @ self.params["kernel"] + self.params.get("bias", 0)

    def norm(self, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * self.params["scale"] + self.params["bias"]

    def rms(self, x):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * self.params["scale"]

    def attend(self, x):
        return self["o_proj"].dense(self["v_proj"].dense(x))


def test_opt_350m_normalises_after_adding_and_projects_its_embeddings():
    model = opt.build(
        vocab_size=11, hidden_size=8, ffn_dim=12, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=5,
        word_embed_proj_dim=6, do_layer_norm_before=False,
    )  # fmt: skip
    variables, tokens = drawn(model), jnp.asarray([[3], [7]], jnp.int32)
    w = Weights(variables["params"])
    table = w["embed_tokens"].params["embedding"]
    x = w["project_in"].dense(table[tokens[:, 0]]) + w["embed_positions"].params["embedding"][2]
    for layer in (w["layers_0"], w["layers_1"]):
        x = layer["self_attn_layer_norm"].norm(x + layer["self_attn"].attend(x))
        x = layer["final_layer_norm"].norm(x + layer["fc2"].dense(np.maximum(layer["fc1"].dense(x), 0)))
    logits, _ = jax.jit(model.apply)(variables, tokens)
    np.testing.assert_allclose(logits[:, 0], w["project_out"].dense(x) @ table.T, rtol=1e-4, atol=1e-4)
    assert opt.from_config(opt.to_config(model)) == model
    with pytest.raises(ValueError, match="6 tokens, but max_position_embeddings=5"):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 6), jnp.int32))


def test_t5_v1_1_gates_its_mlp_and_has_a_head_of_its_own():
    model = t5.build(
        vocab_size=11, d_model=8, d_kv=3, d_ff=12, num_heads=2, num_layers=1, num_decoder_layers=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    variables, tokens = drawn(model), jnp.asarray([[3], [7]], jnp.int32)
    w = Weights(variables["params"])

    def gated(layer, x):
        y, mlp = layer["mlp_norm"].rms(x), layer["mlp"]
        gate = mlp["wi_0"].dense(y)
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return x + mlp["wo"].dense(gate * mlp["wi_1"].dense(y))

    embedded = w["shared"].params["embedding"][tokens[:, 0]]
    encoder, decoder = w["encoder"], w["decoder"]
    x = embedded + encoder["block_0"]["self_attn"].attend(encoder["block_0"]["self_norm"].rms(embedded))
    encoded = encoder["final_layer_norm"].rms(gated(encoder["block_0"], x))
    x = embedded
    for layer in (decoder["block_0"], decoder["block_1"]):
        x = x + layer["self_attn"].attend(layer["self_norm"].rms(x))
        x = gated(layer, x + layer["cross_attn"].attend(encoded))
    logits, endpoints = jax.jit(model.apply)(variables, tokens, tokens)
    np.testing.assert_allclose(endpoints["encoder_hidden"][:, 0], encoded, rtol=1e-4, atol=1e-4)
    expected = w["lm_head"].dense(decoder["final_layer_norm"].rms(x))
    np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-4, atol=1e-3)
    assert t5.from_config(t5.to_config(model)) == model


def test_decoder_tokens_are_the_labels_moved_right():
    labels = jnp.asarray([[5, 6, 1, -100], [7, 1, -100, -100]])
    assert t5.shift_right(labels, start=2, pad=0).tolist() == [[2, 5, 6, 1], [2, 7, 1, 0]]


def test_positions_of_roberta_follow_the_tokens():
    tokens = jnp.asarray([[0, 5, 1, 6, 1], [0, 5, 5, 5, 2]])
    assert bert.positions_of(tokens, pad=1).tolist() == [[2, 3, 1, 4, 1], [2, 3, 4, 5, 6]]


@pytest.fixture(scope="module", params=[False, True], ids=["bert", "roberta"])
def encoder(request):
    options = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = bert.build(**options, intermediate_size=12, max_position_embeddings=9, roberta=request.param, num_labels=3)
    variables = drawn(model)
    apply = jax.jit(model.apply, static_argnames="train")
    return model, variables, apply


def test_words_may_come_as_embeddings(encoder):
    """What is made by a network to be read has no indices."""
    model, variables, apply = encoder
    tokens = jnp.asarray([[4, 7, 5, 6]], jnp.int32)
    words = variables["params"]["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_allclose(apply(variables, words[tokens])[0], apply(variables, tokens)[0], rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_while_training_alone(encoder):
    model, variables, apply = encoder
    tokens = jnp.asarray([[4, 7, 5, 6]], jnp.int32)
    train = lambda seed: apply(variables, tokens, train=True, rngs={"dropout": jax.random.key(seed)})[0]
    first = train(0)
    np.testing.assert_array_equal(first, train(0))
    assert not np.allclose(first, train(1)) and not np.allclose(first, apply(variables, tokens)[0])


def test_what_no_table_holds_is_refused():
    for make, message in (
        (lambda: language.shapes(bert.build(head="vote")), "head='vote' is none of classify, mlm, none"),
        (lambda: bert.from_config({"position_embedding_type": "relative_key"}), "position_embedding_type=absolute"),
        (lambda: language.shapes(t5.build(feed_forward_proj="gated-")), "feed_forward_proj='gated-' is no"),
        (lambda: language.create("llama_7"), "did you mean 'llama_7b'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
