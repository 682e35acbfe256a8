"""Training of language models: the losses by hand, the recipe, and every config for two steps."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import train
from research import language
from research.core import config as configs
from research.core import runner, writers
from research.core.errors import UserError
from research.language import parallel, perplexity, training

ROOT = pathlib.Path(__file__).parents[2] / "configs" / "language"
CONFIGS = sorted(path for path in ROOT.glob("*.py") if "def get_config" in path.read_text())
SMALL = f"{ROOT}/wikitext_small.py:smoke"
WORDS = 300


def resolved(*overrides):
    config = configs.load(SMALL, [f"--config.{text}" for text in overrides])
    data = train.open_data(config)
    return train.resolve(config, data), data


@pytest.fixture(scope="module")
def data():
    return resolved()[1]


@pytest.fixture(scope="module")
def stepped(data):
    """Runner on one device, state at the start and after a step, the step's batch and metrics."""
    config, _ = resolved("optimizer.weight_decay=0")
    return step(config, data, jax.devices()[:1])


def step(config, data, devices):
    bound = runner.build(
        train.build(config, data), axes=config.parallel.axes, rules=config.parallel.rules, devices=devices
    )
    batch = next(train.batches(config, data)[0](0))
    state = bound.init(jax.random.PRNGKey(1))
    start = jax.device_get(state)
    state, metrics = bound.train_step(state, bound.put(batch))
    return bound, start, state, batch, {name: float(total / count) for name, (total, count) in metrics.items()}


def losses(params, tokens):
    """Cross-entropies of all tokens but the first of each row, in float64."""
    model = training.network(resolved()[0].model, WORDS)
    logits = np.asarray(model.apply({"params": params}, tokens)[0], np.float64)[:, :-1]
    chances = np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True)
    return -np.log(np.take_along_axis(chances, tokens[:, 1:, None].astype(np.int64), axis=-1)[..., 0])


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_two_steps_and_gives_a_model(path, tmp_path):
    train.run(configs.load(f"{path}:smoke"), tmp_path)
    rows = writers.read_rows(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2] and rows[-1]["kind"] == "done"
    assert all(value is not None for row in rows for value in row.values())
    model, variables, config = training.trained(tmp_path)
    assert config == {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
    held_out = train.open_data(configs.load(f"{path}:smoke")).eval.tokens
    found = perplexity.perplexity(model.apply, variables, held_out, context=16, batch=64)
    assert np.log(found) == pytest.approx(rows[-1]["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_how_to_run_it(path):
    text = path.read_text().split('"""')[1]
    for word in ("Command:", "Hardware:", "Published:", "python -m launch", path.stem):
        assert word in text, f"{path.name}: its docstring lacks {word!r}"


def test_losses_are_the_cross_entropies_of_the_next_tokens(stepped):
    bound, start, state, batch, metrics = stepped
    assert metrics["loss"] == pytest.approx(np.mean(losses(start.params, batch["tokens"])), rel=1e-6)
    masked = {**batch, "mask": np.float32(np.arange(16) % 3 == 0)}
    total, count = bound.eval_step(state, bound.put(masked))["loss"]
    expected = losses(jax.device_get(state.params), batch["tokens"])[::3]
    assert count == expected.size and total == pytest.approx(np.sum(expected), rel=1e-5)


def test_only_matrices_decay(stepped, data):
    config, _ = resolved("optimizer.weight_decay=0.5", "schedule.name=constant")
    rate = config.optimizer.lr
    plain = jax.device_get(stepped[2].params)
    start = stepped[1].params
    decayed = jax.device_get(step(config, data, jax.devices()[:1])[2].params)

    def check(path, before, without, found):
        expected = without - rate * 0.5 * before if before.ndim > 1 else without
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, start, plain, decayed)


def test_eight_devices_step_as_one(stepped, data):
    config, _ = resolved("optimizer.weight_decay=0", "parallel.axes.fsdp=2", "parallel.axes.tensor=2")
    with config.unlocked():
        config.parallel.rules = parallel.RULES
    _, _, state, _, metrics = step(config, data, jax.devices())
    assert metrics["loss"] == pytest.approx(stepped[4]["loss"], rel=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, jax.device_get(state.params), jax.device_get(stepped[2].params))


def test_an_opt_trains_too():
    config, data = resolved()
    options = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with config.unlocked():
        config.model.family, config.model.options = "opt", {**options, "max_position_embeddings": 16}
    made = train.build(config, data)
    state = jax.eval_shape(made.init, jax.random.PRNGKey(0))
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    after, metrics = jax.eval_shape(made.train_step, state, {"tokens": tokens})
    assert jax.tree.map(jnp.shape, after.params) == jax.tree.map(jnp.shape, state.params) and "loss" in metrics
    shapes = language.shapes(training.network(config.model, WORDS))
    assert made.costs()["model"]["params"] == sum(x.size for x in jax.tree.leaves(shapes))


def test_the_small_llama_is_of_twelve_and_a_half_million_parameters():
    config = configs.load(f"{ROOT}/wikitext_small.py")
    shapes = language.shapes(training.network(config.model, config.data.options.vocab))
    block = 4 * 320 * 320 + 3 * 320 * 864 + 2 * 320
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 8 * block + 2 * 4096 * 320 + 320 == 12_539_200


@pytest.mark.parametrize(
    "section, message",
    [
        ({"family": "lama"}, "model.family: no 'lama'; it is one of llama, opt"),
        ({"options": {"vocab_size": 299}}, "model.options.vocab_size: 299, but the tokeniser has 300 tokens"),
        ({"options": {"layers": 2}}, "model.options: .*'layers'"),
    ],
)
def test_models_that_cannot_be_are_refused(section, message):
    section = configs.freeze(configs.ConfigDict({"family": "llama", "dtype": "float32", "options": {}} | section))
    with pytest.raises(UserError, match=message):
        training.network(section, WORDS)


def test_an_unfinished_run_has_no_model(tmp_path):
    with pytest.raises(UserError, match=r"no finished run of a language model \(config.json is missing\)"):
        training.trained(tmp_path)
    configs.claim(tmp_path, configs.load(SMALL))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"\(weights/model.safetensors is missing\)"):
        training.trained(tmp_path)
