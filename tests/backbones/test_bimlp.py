"""BiMLP: official counts and names, forms of training and inference. Its numbers are checked by tests/port."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import bimlp, create
from research.core import cost, sharding
from research.port import names
from tests.backbones import drawn
from tests.conftest import GOLDEN

OFFICIAL = {"bimlp_s": "BiMLP_S", "bimlp_m": "BiMLP_M"}
SMALL = {"layers": (1, 1), "embed_dims": (4, 8), "num_classes": 5}
SMALLEST = {"layers": (1,), "embed_dims": (8,), "num_classes": 8}  # compiles in half the time


def read(name):
    return json.loads((GOLDEN / "bimlp" / name).read_text())


@pytest.fixture(scope="module", params=OFFICIAL)
def published(request):
    """(official name, module, shapes of its variables)."""
    model = create(request.param)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    return OFFICIAL[request.param], model, jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)


def test_counts_are_exact(published):
    name, model, variables = published
    entry, image = read("counts.json")[name], jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert cost.params_count(variables["params"]) == entry["params"]
    assert cost.params_count(variables) == entry["params_incl_bn_stats"]
    operations = cost.operations(lambda v, x: model.apply(v, x)[0], variables, image)
    assert operations == (entry["bops"], entry["macs"])
    assert operations.total == entry["ops_bops64_plus_macs"]


def test_counts_by_layer_are_the_official_breakdown():
    rows = cost.by_layer(create("bimlp_s"), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    kinds = {"stem": "patch_embed", "head": "head", "reweight": "reweight", "sfc": "/sfc_", "bin_dw": "/tfc_"}
    found = {kind: sum(row.macs for row in rows if part in row.path) for kind, part in kinds.items()}
    found["down"] = sum(row.macs for row in rows if row.path.endswith("/proj") and not row.binary)
    found["down"] -= found["stem"]
    found["bin_1x1"] = sum(row.binary for row in rows) - found["sfc"] - found["bin_dw"] - found["reweight"]
    assert found == read("counts.json")["BiMLP_S"]["breakdown"]


def test_names_and_shapes_are_the_official_ones(published):
    name, _, variables = published
    rules = bimlp.NAMES["official"]
    state = names.to_official(jax.tree.map(lambda leaf: np.empty(leaf.shape, np.int8), variables), rules)
    assert {key: list(array.shape) for key, array in state.items()} == read("state_dict_shapes.json")[name]


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, 37, 30, 3))


@pytest.fixture(scope="module")
def variables(images):
    return drawn.variables(bimlp.build(**SMALL), images)


def evaluated(variables, images, **changes):
    model = bimlp.build(**{**SMALL, **changes})
    return jax.jit(lambda v, x: model.apply(v, x))(variables, images)


@pytest.fixture(scope="module")
def exact(variables, images):
    return evaluated(variables, images)


def test_endpoints_at_an_odd_size(exact):
    logits, endpoints = exact
    assert logits.shape == (8, 5)
    assert {name: x.shape[1:] for name, x in endpoints.items()} == {
        "stem": (9, 7, 4),
        "stage1": (9, 7, 4),
        "stage2": (5, 4, 8),
        "features": (5, 4, 8),
        "pooled": (8,),
    }


@pytest.fixture(scope="module")
def training(images):
    """(variables, a jitted training step: loss, statistics and gradients, the list of its traces)."""
    model, traces = bimlp.build(**SMALLEST, drop_path=0.1), []

    @jax.jit
    def step(variables, images, key):
        traces.append(1)
        statistics = {"batch_stats": variables["batch_stats"]}

        def loss(params):
            rngs = {"dropout": key}
            (logits, _), new = model.apply(
                {"params": params, **statistics}, images, train=True, rngs=rngs, mutable=["batch_stats"]
            )
            return jnp.mean(jnp.square(logits - 1)), new

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return drawn.variables(model, images), step, traces


def test_every_parameter_learns_and_the_step_compiles_once(training, images):
    variables, step, traces = training
    (_, new), gradients = step(variables, images, jax.random.key(0))
    step(variables, images + 0.1, jax.random.key(1))
    assert len(traces) == 1
    flat = sharding.paths(gradients)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for _, leaf in flat)
    # A constant added to every input of a batch norm, alone or before a binary layer, may be without effect.
    silent = [path for path, leaf in flat if not bool(jnp.any(leaf)) and "move" not in path and "act" not in path]
    assert not silent
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), new["batch_stats"], variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 0


def test_frozen_weights_compute_the_same_and_are_two_values_an_output(variables, images, exact):
    frozen = bimlp.freeze(variables["params"])
    # Taken as they are, the frozen weights are what the layers made of the latent ones.
    logits, _ = evaluated({**variables, "params": frozen}, images, weights="real")
    np.testing.assert_allclose(logits, exact[0], rtol=1e-4, atol=1e-5)
    again = bimlp.freeze(frozen)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), again, frozen)
    kernel = np.abs(frozen["network_0_0"]["mlp"]["fc1"]["kernel"])
    np.testing.assert_allclose(kernel, np.broadcast_to(kernel[:, :, :1], kernel.shape), rtol=1e-6)
    for module, leaf in (("head", "kernel"), ("patch_embed", "proj"), ("network_1", "proj")):
        jax.tree.map(np.testing.assert_array_equal, frozen[module][leaf], variables["params"][module][leaf])


def test_the_published_networks_differ_in_depth_and_norm():
    assert create("bimlp_m").norm_layer == "sample" and sum(create("bimlp_m").layers) == 18


def test_shortcuts_copy_side_by_side_and_average_neighbours():
    x = jnp.arange(8.0)[None]
    np.testing.assert_array_equal(bimlp.matched(x, 16), np.tile(np.arange(8), 2)[None])
    np.testing.assert_array_equal(bimlp.matched(x, 2), [[1.5, 5.5]])
    with pytest.raises(ValueError, match="no shortcut from 8 to 3"):
        bimlp.matched(x, 3)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (8, 9)])
def test_halving_shares_what_a_window_sticks_out_by(shape):
    x = np.random.default_rng(0).normal(size=(1, *shape, 2)).astype(np.float32)

    def pool(window):
        spans = []
        for size in shape:
            out = -(-size // 2)
            before = max((out - 1) * 2 + window - size, 0) // 2
            spans.append([range(max(2 * i - before, 0), min(2 * i - before + window, size)) for i in range(out)])
        return np.array([[x[:, r][:, :, c].max((1, 2)) for c in spans[1]] for r in spans[0]]).transpose(2, 0, 1, 3)

    np.testing.assert_allclose(bimlp.halved(x), sum(map(pool, (2, 3, 5, 7))) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"norm_layer": "group"}, "norm_layer: 'group' is none of batch, sample"),
        ({"activation": "dorefa"}, "activation: 'dorefa' is none of ternary"),
        ({"weights": "dorefa"}, "weights: 'dorefa' is none of xnor"),
        ({"embed_dims": (8, 18)}, "embed_dims: 18 is no multiple of 4"),
    ],
)
def test_wrong_arguments_are_refused(changes, text):
    with pytest.raises(ValueError, match=text):
        bimlp.build(**{**SMALL, **changes})
