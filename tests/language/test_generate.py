"""Generation: what the whole forward pass would choose, whatever the padding; ends; draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import language
from research.language import generate, llama, opt, t5

COUNT, PAD = 5, 0
SMALL = {"vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": llama.build(**SMALL, intermediate_size=12, num_key_value_heads=2),
    "opt": opt.build(**SMALL, ffn_dim=12, max_position_embeddings=4 + COUNT - 1),
    "t5": t5.build(
        vocab_size=13,
        d_model=8,
        d_kv=3,
        d_ff=12,
        num_heads=2,
        num_layers=2,
        decoder_start_token_id=2,
        tie_word_embeddings=False,
    ),
}
PROMPTS = np.array([[PAD, PAD, 5, 6], [7, 3, 9, 4]], np.int32)
MASK = PROMPTS != PAD


@pytest.fixture(scope="module", params=MODELS)
def written(request):
    """A model, its variables, and what it writes greedily."""
    model = MODELS[request.param]
    draw = lambda key: jax.tree.map(lambda x: x * (1 if isinstance(model, t5.T5) else 12), language.init(model, key))
    variables = jax.jit(draw)(jax.random.key(2))
    found = generate.generate(model, variables, PROMPTS, mask=MASK, max_new_tokens=COUNT)
    return model, variables, np.asarray(found)


def test_greedy_is_what_the_whole_forward_pass_chooses(written):
    """Token by token, without a cache."""
    model, variables, found = written
    encoder = isinstance(model, t5.T5)
    start = np.full((2, 1), 2) if encoder else PROMPTS
    tokens = np.concatenate([start, np.zeros((2, COUNT), np.int32)], axis=1).astype(np.int32)
    mask = np.concatenate([MASK, np.ones((2, COUNT - 1), bool)], axis=1)
    apply = jax.jit(
        lambda own: model.apply(variables, PROMPTS, own, MASK) if encoder else model.apply(variables, own, mask)
    )
    for index in range(COUNT):
        last = start.shape[1] + index
        tokens[:, last] = np.argmax(apply(tokens[:, :-1])[0][:, last - 1], axis=-1)
    np.testing.assert_array_equal(found, tokens[:, -COUNT:])
    assert len(np.unique(found)) > 2


def test_padding_and_neighbours_change_nothing(written):
    model, variables, found = written
    alone = generate.generate(model, variables, PROMPTS[:1, 2:], max_new_tokens=COUNT)
    np.testing.assert_array_equal(alone[0], found[0])


def test_a_text_ends_at_its_end_token(written):
    model, variables, found = written
    end = int(found[0, 1])
    options = {"mask": MASK, "max_new_tokens": COUNT, "pad": 11}
    ended = np.asarray(generate.generate(model, variables, PROMPTS, eos=(end, 12), **options))
    for row, expected in zip(ended, found, strict=True):
        stops = np.flatnonzero(np.isin(expected, (end, 12)))
        length = stops[0] + 1 if len(stops) else COUNT
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert np.all(row[length:] == 11)
    assert np.any(ended[0] == 11)


@pytest.fixture(scope="module")
def writer():
    model = MODELS["llama"]
    return model, jax.jit(lambda key: language.init(model, key))(jax.random.key(0))


def test_draws_follow_the_key(writer):
    draw = lambda seed, **options: np.asarray(
        generate.generate(*writer, PROMPTS, mask=MASK, max_new_tokens=COUNT, key=jax.random.key(seed), **options)
    )
    greedy = generate.generate(*writer, PROMPTS, mask=MASK, max_new_tokens=COUNT)
    np.testing.assert_array_equal(draw(0, temperature=3.0, top_k=1), greedy)
    first = draw(0, temperature=3.0, top_p=0.9)
    np.testing.assert_array_equal(first, draw(0, temperature=3.0, top_p=0.9))
    assert np.any(first != draw(1, temperature=3.0, top_p=0.9))


def test_the_likeliest_tokens_are_kept():
    chances = np.array([[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    kept = lambda *arguments: np.isfinite(generate.restricted(jnp.log(jnp.asarray(chances, jnp.float32)), *arguments))
    np.testing.assert_array_equal(kept(2)[0], [True, False, True, False])
    assert kept(2)[1].all()  # equals stay
    np.testing.assert_array_equal(kept(0, 0.69)[0], [True, False, True, False])
    np.testing.assert_array_equal(kept(0, 0.71)[0], [True, False, True, True])
    np.testing.assert_array_equal(kept(2, 0.5)[0], [True, False, False, False])  # 0.4 / 0.7 of the two that are left


def test_options_that_make_no_sense_are_refused(writer):
    for options, message in (
        ({"temperature": 1.0}, "give a key, or temperature=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_p": 0.0}, r"top_p lies in \(0, 1\]"),
        ({"mask": MASK[:, ::-1]}, "pad prompts on the left"),
    ):
        with pytest.raises(ValueError, match=message):
            generate.generate(*writer, PROMPTS, **{"max_new_tokens": 2, **options})
