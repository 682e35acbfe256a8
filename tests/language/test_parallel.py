"""Language models split over a mesh: every large matrix is, and the logits stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research import language
from research.core import sharding
from research.language import bert, llama, opt, parallel, t5

SMALL = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "llama": llama.build(**SMALL, intermediate_size=48, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "opt": opt.build(**SMALL, ffn_dim=48, max_position_embeddings=8),
    "bert": bert.build(**SMALL, intermediate_size=48, max_position_embeddings=8),
    "t5": t5.build(vocab_size=16, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=1),
}
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "intermediate", "wi")
WRITERS = ("o_proj", "down_proj", "fc2", "output", "wo")


@pytest.fixture(scope="module")
def mesh():
    return sharding.mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_read_are_split_by_outputs_and_those_that_write_by_inputs(name, mesh):
    placed = sharding.shardings(language.shapes(MODELS[name]), mesh, parallel.RULES, smallest=1)
    specs = {path.split("/")[-2]: leaf.spec for path, leaf in sharding.paths(placed) if path.endswith("/kernel")}
    assert len(specs) >= 5
    for layer, spec in specs.items():
        if layer in READERS + WRITERS:
            assert spec == PartitionSpec(*(("fsdp", "tensor") if layer in READERS else ("tensor", "fsdp"))), layer
    tables = [
        leaf.spec
        for path, leaf in sharding.paths(placed)
        if path.split("/")[-2] in ("embed_tokens", "shared", "word_embeddings")
    ]
    assert tables == [PartitionSpec("tensor", "fsdp")]


def test_logits_agree_on_one_device_and_on_eight(mesh):
    model = MODELS["llama"]
    variables = jax.jit(lambda key: language.init(model, key))(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (4, 6)), jnp.int32)
    expected = jax.jit(model.apply)(variables, tokens)[0]
    placed = sharding.shardings(variables, mesh, parallel.RULES, smallest=1)
    split = jax.device_put((variables, tokens), (placed, sharding.batch_sharding(mesh)))
    kernel = split[0]["params"]["layers_0"]["mlp"]["down_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (24, 16)
    found = jax.jit(model.apply)(*split)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
