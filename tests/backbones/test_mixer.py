"""MLP-Mixer and ResMLP: forms, names and initial values. Their numbers are checked by tests/port."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import mixer
from research.port import names

SMALL = {"img_size": (24, 16), "patch_size": 8, "embed_dim": 12, "num_blocks": 2, "num_classes": 5}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 24, 16, 3))


def initialised(images, **changes):
    model = mixer.build(**{**SMALL, **changes})
    return model, jax.jit(model.init)(jax.random.key(0), images)


@pytest.mark.parametrize("block", ["mixer", "resmlp"])
def test_endpoints_are_named_and_shaped(images, block):
    model = mixer.build(**SMALL, block=block)
    (logits, endpoints), _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), images)
    assert logits.shape == (2, 5)
    tokens = {key: (6, 12) for key in ("patch_embed", "block01", "block02", "tokens")}
    assert {key: value.shape[1:] for key, value in endpoints.items()} == tokens | {"pooled": (12,)}


def test_hidden_widths_follow_the_width_of_a_token(images):
    _, variables = initialised(images, mlp_ratio=(0.75, 3.0))
    block = variables["params"]["blocks_0"]
    assert block["mlp_tokens"]["fc1"]["kernel"].shape == (6, 9)
    assert block["mlp_channels"]["fc1"]["kernel"].shape == (12, 36)


def test_a_mixer_starts_from_zero_logits(images):
    model, variables = initialised(images)
    logits, endpoints = jax.jit(model.apply)(variables, images)
    np.testing.assert_array_equal(logits, 0)
    assert float(jnp.max(jnp.abs(endpoints["block02"] - endpoints["block01"]))) > 0.01


def test_resmlp_starts_near_the_identity(images):
    model, variables = initialised(images, block="resmlp", init_values=1e-3)
    _, endpoints = jax.jit(model.apply)(variables, images)
    step = jnp.max(jnp.abs(endpoints["tokens"] - endpoints["patch_embed"]))
    assert 1e-5 < float(step) < 0.05


def test_training_draws_paths_and_rematerialises(images):
    _, variables = initialised(images, num_classes=0)

    def gradient(remat):
        model = mixer.build(**{**SMALL, "num_classes": 0}, drop_path=0.7, remat=remat)
        total = lambda v, key: jnp.sum(model.apply(v, images, train=True, rngs={"dropout": key})[0] ** 3)
        return jax.jit(jax.grad(total))

    kernel = lambda grads: grads["params"]["blocks_0"]["mlp_tokens"]["fc1"]["kernel"]
    plain, saved = gradient(False), gradient(True)
    draws = [kernel(plain(variables, jax.random.key(seed))) for seed in range(4)]
    np.testing.assert_allclose(kernel(saved(variables, jax.random.key(0))), draws[0], rtol=1e-4, atol=1e-6)
    assert max(float(jnp.max(jnp.abs(other - draws[0]))) for other in draws) > 1e-5


@pytest.mark.parametrize("dialect", list(mixer.NAMES))
def test_resmlp_goes_out_and_comes_back_under_each_dialect(images, dialect):
    _, variables = initialised(images, block="resmlp")
    variables = jax.tree.map(np.asarray, variables)
    state = names.to_official(variables, mixer.NAMES[dialect])
    expected = {
        "timm": {"stem.proj.weight": (12, 3, 8, 8), "blocks.1.norm1.alpha": (1, 1, 12), "blocks.0.ls2": (12,)},
        "official": {"patch_embed.proj.bias": (12,), "blocks.1.attn.weight": (6, 6), "blocks.0.gamma_2": (12,)},
    }[dialect]
    assert {name: state[name].shape for name in expected} == expected
    back = names.from_official(variables, state, mixer.NAMES[dialect])
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_another_block_is_refused():
    with pytest.raises(ValueError, match="neither 'mixer' nor 'resmlp'"):
        mixer.build(block="gmlp")
