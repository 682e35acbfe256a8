"""Folders of Hugging Face's form, made from golden weights: read, written, in shards, under old names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.language import checkpoint, llama
from research.port import tensors, verify

ALL = ("llama", "opt", "bert_mlm", "bert_seqcls", "roberta_seqcls", "t5")
KINDS = {"bert_mlm": "BertForMaskedLM", "bert_seqcls": "BertForSequenceClassification"}
REPEATED = {
    "opt": ["lm_head.weight"],
    "t5": ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
}


@pytest.fixture
def folder(golden, tmp_path):
    """A function from a golden's name to (folder with its model, golden)."""

    def make(name, rename=lambda name: name, drop=()):
        case = verify.load(golden / "text_common" / f"{name}.npz", np.float32)
        root = tmp_path / name
        weights = {rename(key): array for key, array in case.w.items() if key not in drop}
        tensors.write(root / "model.safetensors", weights, {"format": "pt"})
        config = {**case.kwargs, "architectures": [KINDS[name]] if name in KINDS else None}
        (root / "config.json").write_text(json.dumps(config))
        return root, case

    return make


@pytest.mark.parametrize("name", ALL)
def test_a_folder_is_read_and_written(folder, name, tmp_path):
    """Tied weights may be repeated or left out; what is written holds every parameter once."""
    root, case = folder(name)
    model, variables, config = checkpoint.load(root)
    checkpoint.save(tmp_path / "again", model, variables, config=config, shard_bytes=20_000)
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 2
    state = checkpoint.read(tmp_path / "again")
    assert set(state) <= set(case.w) and all(np.array_equal(state[key], case.w[key]) for key in state)
    sizes = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())["metadata"]
    assert sizes["total_size"] == sum(x.nbytes for x in jax.tree.leaves(variables))
    again = checkpoint.load(tmp_path / "again")
    assert again.model == model and again.config["vocab_size"] == config["vocab_size"]
    jax.tree.map(np.testing.assert_array_equal, again.variables, variables)
    bare, _ = folder(name, drop=REPEATED.get(name, ()))
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(bare).variables, variables)


def test_a_loaded_model_computes_the_golden_logits(folder):
    root, case = folder("llama")
    model, variables, _ = checkpoint.load(root)
    logits, _ = jax.jit(model.apply)(variables, case.x["input_ids"])
    np.testing.assert_allclose(logits, case.y["logits"], rtol=1e-4, atol=1e-5)


def test_parameters_have_the_type_that_is_asked_for(folder):
    root, _ = folder("llama")
    loaded = checkpoint.load(root, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.variables)} == {np.dtype(jnp.bfloat16)}
    checkpoint.save(root / "narrow", *loaded)
    assert {array.dtype for array in checkpoint.read(root / "narrow").values()} == {np.dtype(jnp.bfloat16)}


def test_old_and_bare_names_are_understood(folder):
    """Files of 2018 have gamma and beta, a bare model's have no prefix."""
    plain = checkpoint.load(folder("bert_mlm")[0]).variables
    old = lambda name: name.removeprefix("bert.").replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load(folder("bert_mlm", old)[0]).variables, plain)


def test_a_new_head_takes_the_place_of_the_files(folder):
    root, case = folder("bert_seqcls")
    kept = checkpoint.load(root).variables["params"]
    new = checkpoint.load(root, new_head=0, num_labels=5).variables["params"]
    assert new["classifier"]["kernel"].shape == (32, 5)
    jax.tree.map(np.testing.assert_array_equal, new["layer_0"], kept["layer_0"])
    np.testing.assert_array_equal(new["pooler"]["kernel"], kept["pooler"]["kernel"])
    bare = checkpoint.load(root, head="none")
    assert set(bare.variables["params"]) == {"embeddings", "layer_0", "layer_1"}
    with pytest.raises(ValueError, match=r"0 of \d+ names missing, 0 unused, 2 of another shape"):
        checkpoint.load(root, num_labels=5)


def test_what_does_not_fit_is_said(folder, tmp_path):
    root, _ = folder("llama", drop=["model.norm.weight"])
    with pytest.raises(ValueError, match=r"llama: the weights do not fit.*\n.*\n +model.norm.weight \(32,\)"):
        checkpoint.load(root)
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        checkpoint.load(tmp_path / "nowhere")
    (root / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        checkpoint.load(root)
    (root / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type 'gpt2' is none of llama, opt, bert, roberta, t5"):
        checkpoint.load(root)
    (root / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no intact JSON file"):
        checkpoint.load(root)
    with pytest.raises(ValueError, match="no config.json of Hugging Face can state this model"):
        checkpoint.save(tmp_path / "out", llama.build(num_experts=2), {})
