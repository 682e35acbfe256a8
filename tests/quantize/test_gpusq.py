"""GPUSQ-ViT: what is pruned and stays so, what is rounded, its losses by hand, its bytes, both stages end to end."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs.quantize import gpusq as shared
from configs.quantize import gpusq_deit_s, gpusq_vit_small
from configs.tokens.cifar_small import SMALL
from launch import train
from research import backbones
from research.backbones import classify
from research.core import config as configs
from research.core import writers
from research.core.errors import UserError
from research.port import checkpoint
from research.quantize import gpusq, rules, sparse24, sparse_layers
from research.quantize.grids import Form
from research.quantize.quantized import dequantize, quantize
from research.quantize.rules import Rule

ROOT = pathlib.Path(shared.__file__).parent
SHAPE = dict(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, mlp_ratio=1.5)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def network():
    return classify.network("vit_tiny_patch16_224", 16, 8, **SHAPE)


@pytest.fixture(scope="module")
def params(network):
    """Normal numbers in place of all parameters."""
    shapes = jax.eval_shape(network.init, jax.random.PRNGKey(0))[0]
    return jax.tree.map(lambda x: RNG.normal(scale=0.25, size=x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def masks(params):
    return jax.tree.map(np.asarray, sparse_layers.prune(params, "2:4")[1])


@pytest.fixture(scope="module")
def deit_s():
    """Shapes of its parameters."""
    init = backbones.create("deit_small_patch16_224").init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]


def halves(kernel, together=1):
    """Whether two of every four (pairs of) neighbours along a kernel's inputs are zero, and no others."""
    zero = sparse_layers.rows(np.asarray(kernel)).reshape(-1, 4, together) == 0
    return (zero.all(2) == zero.any(2)).all() and (zero.all(2).sum(1) == 2).all()


def test_layers_are_those_of_blocks_and_patches_whose_sizes_fit(params, deit_s):
    # The hidden width of 24 is no multiple of 16, and so fc2 has unfit inputs; the classifier is not asked.
    found = sparse_layers.layers(params)
    assert sorted(found) == ["blocks_0/attn/proj", "blocks_0/attn/qkv", "blocks_0/mlp/fc1", "patch_embed/proj"]
    assert len(sparse_layers.layers(deit_s)) == 12 * 4 + 1
    with pytest.raises(ValueError, match="only vision transformers"):
        sparse_layers.layers({"conv1": {"kernel": jnp.zeros((3, 3, 16, 16))}})


def test_masks_keep_half_along_the_inputs(params, masks):
    masks = traverse_util.flatten_dict(masks)
    kernel = params["blocks_0"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(masks["blocks_0", "attn", "qkv", "kernel"], sparse24.best_1d(kernel.T).T)
    # A convolution is the matrix of its outputs and (channel, row, column), as in official checkpoints.
    patches = params["patch_embed"]["proj"]["kernel"]
    assert sparse_layers.rows(patches)[3, 16 * 2 + 4 * 1 + 0] == patches[1, 0, 2, 3]
    assert all(halves(mask) for mask in masks.values())
    pruned, pairs = (traverse_util.flatten_dict(tree) for tree in sparse_layers.prune(params, "4:8"))
    for path, mask in pairs.items():
        assert halves(mask, 2)
        np.testing.assert_array_equal(pruned[path], traverse_util.flatten_dict(params)[path] * np.asarray(mask))
    # Of four pairs the two of most magnitude.
    best = np.abs(kernel.T).reshape(-1, 4, 2).sum(-1)
    kept = np.asarray(pairs["blocks_0", "attn", "qkv", "kernel"]).T.reshape(-1, 4, 2)[..., 0]
    np.testing.assert_allclose((best * kept).sum(1), np.sort(best, 1)[:, 2:].sum(1), rtol=1e-6)
    with pytest.raises(ValueError, match="pattern: '1:4' is none of 2:4, 4:8"):
        sparse_layers.prune(params, "1:4")


def test_kernels_are_masked_and_rounded_to_the_grid_and_gradients_go_through_what_is_kept(params, masks):
    taken = jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), params)
    flat, chosen, given = (traverse_util.flatten_dict(tree) for tree in (params, masks, taken))

    @jax.jit
    def run(params):
        made = []
        for bits in (None, 8, 4):
            seen, pull = jax.vjp(lambda params, bits=bits: sparse_layers.apply(params, masks, bits), params)
            read = lambda x, bits=bits: dequantize(quantize(x.reshape(-1, x.shape[-1]), Form(bits, rule="absmax")))
            pruned = {path: flat[path] * np.asarray(mask, np.float32) for path, mask in chosen.items()}
            expected = pruned if bits is None else {path: read(x).reshape(x.shape) for path, x in pruned.items()}
            made.append((seen, pull(taken)[0], expected))
        return made

    for seen, back, expected in run(params):
        seen, back = traverse_util.flatten_dict(seen), traverse_util.flatten_dict(back)
        for path, kernel in flat.items():
            np.testing.assert_array_equal(seen[path], expected.get(path, kernel))
            mask = chosen.get(path)
            # Times a scale and over it again, where there are bits; nothing at all where it is pruned.
            np.testing.assert_allclose(back[path], given[path] if mask is None else given[path] * mask, rtol=1e-6)


def test_the_network_computes_with_pruned_kernels_and_rounded_inputs(network, params, masks):
    images = RNG.uniform(size=(2, 8, 8, 3)).astype(np.float32)

    chosen = (Rule(r"^blocks_0/(attn/(qkv|proj)|mlp/fc1)$", activation_bits=8),)

    @jax.jit
    def run(params):
        plain, eight = (sparse_layers.apply(params, masks, bits) for bits in (None, 8))
        real = network.apply(plain, {}, images)[0]
        with rules.few_bits(chosen):
            rounded = network.apply(eight, {}, images)[0]
        return (real, rounded), [gpusq.forward(network, params, masks, bits, images)[0]["logits"] for bits in (None, 8)]

    (plain, eight), found = run(params)
    np.testing.assert_allclose(found[0], plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], eight, rtol=1e-5, atol=1e-6)
    assert 0 < np.abs(eight - plain).max() < 0.1 * np.abs(plain).max()


def test_losses_by_hand():
    b, names = 3, ("block01", "block02")
    student = {name: RNG.normal(size=(b, 5, 4)) for name in names} | {"logits": np.eye(3)[[0, 1, 2]] * 2}
    teacher = {name: RNG.normal(size=(b, 5, 4)) for name in names} | {"logits": np.eye(3)[[0, 1, 0]] * 3}
    weights = np.array([0.5, 1.5])
    squares = np.array([[((student[n][i] - teacher[n][i]) ** 2).mean() for i in range(b)] for n in names])
    softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    p, q = (softmax(found["logits"]) for found in (teacher, student))
    single = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)

    @jax.jit
    def run(student, teacher, weights):
        losses = gpusq.feature_losses(student, teacher, names)
        given = (gpusq.distillation(student, teacher, names, w) for w in (weights, None))
        return *given, losses, gpusq.factors(losses), gpusq.factors(0 * losses)

    found, even, losses, factors, none = run(single(student), single(teacher), single(weights))
    np.testing.assert_allclose(found[0], (p * np.log(p / q)).sum() / b, rtol=1e-5)
    # The third image's classes differ: it teaches no features.
    np.testing.assert_allclose(found[1], (weights[:, None] * squares[:, :2]).sum() / b, rtol=1e-5)
    np.testing.assert_allclose(even[1], squares[:, :2].sum() / b, rtol=1e-5)
    np.testing.assert_allclose(losses, squares, rtol=1e-5)
    inverse = 1 / squares.mean(1)
    np.testing.assert_allclose(factors, inverse / inverse.mean(), rtol=1e-5)
    np.testing.assert_array_equal(none, 1)
    with pytest.raises(ValueError, match="no endpoint 'block03'"):
        gpusq.feature_losses(student, teacher, ("block03",))


@pytest.mark.parametrize(
    "pattern, bits, width", [("2:4", None, 9.0), ("2:4", 8, 5.0), ("2:4", 4, 3.0), ("4:8", 4, 2.5)]
)
def test_what_is_stored_is_what_is_computed_with(pattern, bits, width):
    """Bits a weight: 16, 8 or 4 for half of them, and an index of 2 for each, or each pair, that is kept."""
    kernel = RNG.normal(size=(128, 24)).astype(np.float32)

    @jax.jit
    def run(kernel):
        mask = sparse_layers.mask(sparse_layers.rows(kernel), pattern).T.astype(kernel.dtype)
        stored, pruned = sparse_layers.pack(kernel, pattern, bits), kernel * mask
        read = dequantize(quantize(pruned, Form(bits, rule="absmax"))) if bits else pruned.astype(jnp.float16)
        return stored, sparse_layers.unpack(stored), read.astype(jnp.float32)

    stored, unpacked, expected = run(kernel)
    np.testing.assert_array_equal(unpacked, expected)
    scales = 24 * 4 if bits else 0
    assert stored.nbytes == kernel.size * width / 8 + scales


def test_deit_s_shrinks_as_published(deit_s):
    for pattern, bits, published in (("2:4", 8, 6.4), ("4:8", 4, 12.7)):
        found = sparse_layers.stored_bytes(deit_s, pattern, bits)
        assert found["dense"] == 4 * 22_050_664
        assert found["dense_layers"] / found["stored_layers"] == pytest.approx(published, rel=0.02)  # less for scales
        assert found["stored"] - found["stored_layers"] == (found["dense"] - found["dense_layers"]) // 2
    dense = sparse_layers.stored_bytes(deit_s, None)
    assert dense["stored"] == dense["dense"] / 2
    four = sparse_layers.stored_bytes(deit_s, None, 4)
    assert four["dense_layers"] / four["stored_layers"] == pytest.approx(8, rel=0.02)


@pytest.fixture(scope="module")
def stages(tmp_path_factory, one_device):
    """Folders of both stages of the small study, two steps each: the second is taught by the first."""
    folder = tmp_path_factory.mktemp("gpusq")
    study, dense = f"{ROOT}/gpusq_vit_small.py", folder / "dense.safetensors"
    teacher = classify.network(gpusq_vit_small.MODEL, 10, SMALL["img_size"], **SMALL)
    shapes = jax.eval_shape(teacher.init, jax.random.PRNGKey(0))[0]
    drawn = jax.tree.map(lambda x: RNG.normal(scale=0.1, size=x.shape).astype(np.float32), shapes)
    checkpoint.save_variables({"params": drawn}, dense)
    given = [f"--config.teacher.weights={dense}"]
    train.run(configs.load(f"{study}:smoke,arms=sparse", given), folder / "prune")
    given += [f"--config.teacher.ensemble.sparse.weights={folder}/prune/weights/sparse.safetensors"]
    train.run(configs.load(f"{study}:stage=quantize,smoke,arms=sparse_int4", given), folder / "quantize")
    return folder


def test_both_stages_train_and_what_was_pruned_stays_zero(stages):
    files = ("dense", "prune/weights/sparse", "quantize/weights/sparse_int4")
    trees = [checkpoint.load_variables(stages / f"{file}.safetensors")["params"] for file in files]
    masks = traverse_util.flatten_dict(sparse_layers.prune(trees[0], "2:4")[1])
    dense, sparse, few = (sparse_layers.layers(tree) for tree in trees)
    for layer, kernel in dense.items():
        mask = np.asarray(masks[*layer.split("/"), "kernel"])
        for trained in (sparse[layer], few[layer]):
            np.testing.assert_array_equal(trained != 0, mask)
        assert (sparse[layer] != kernel * mask).any() and (few[layer] != sparse[layer]).any()
    for name, terms in (("prune", "sparse"), ("quantize", "sparse_int4")):
        rows = writers.read_rows(stages / name)
        steps = [row for row in rows if row["kind"] == "train"]
        assert [row["step"] for row in steps] == [1, 2] and rows[-1]["kind"] == "done"
        assert all(value is not None for row in rows for value in row.values())
        for row in steps:
            parts = [row[f"train/{terms}/{term}"] for term in ("label", "logits", "features")]
            assert row[f"train/{terms}/loss"] == pytest.approx(np.dot(parts, (1, 10, 5)), rel=1e-4)
            assert parts[2] > 0
        scored = {key.split("/")[1] for key in rows[-1] if key.startswith("eval/")}
        assert {terms, f"{terms}_oneshot", "teacher"} <= scored


def test_what_cannot_be_done_is_refused():
    deit = f"{ROOT}/gpusq_deit_s.py:smoke"
    for changes, message in (
        ({"students.sparse.pattern": "1:4"}, "students.sparse.pattern: '1:4' is none of 2:4, 4:8, nor empty"),
        ({"students.sparse.bits": "3"}, "students.sparse.bits: 3 is none of 0, 8, 4"),
        ({"students.sparse.aware": "true"}, "students.sparse.aware: what pruning lost"),
        (
            {"students.sparse.teacher": "teacher_sparse"},
            "there is no 'teacher_sparse' but teacher; 'teacher_sparse' is",
        ),
        ({"distill.labels": "none"}, "distill.labels: 'none' is none of true, teacher"),
    ):
        config = configs.load(deit, [f"--config.{key}={value}" for key, value in changes.items()])
        with pytest.raises(ValueError, match=message):
            gpusq.experiment(config)
    with pytest.raises(UserError, match="stage: no stage 'both'; there are prune, quantize"):
        gpusq_vit_small.get_config("stage=both")
    with pytest.raises(UserError, match="arms: no arm 'int4' of prune; there are dense, sparse"):
        gpusq_vit_small.get_config("arms=int4")
    with pytest.raises(KeyError, match="no option 'bit'"):
        shared.arm("x", {}, bit=4)


def test_the_published_settings():
    c = configs.load(f"{ROOT}/gpusq_deit_s.py:stage=quantize,arms=sparse_int8+even_int4+int4")
    assert c.distill.features == ("block09", "block10", "block11", "block12")
    for name, arm in c.students.items():
        assert (arm.label_weight, arm.logit_weight, arm.feature_weight) == (1, 10, 5)
        assert arm.aware == (name == "sparse_int8") and arm.bits == (8 if name == "sparse_int8" else 4)
        assert (arm.teacher, arm.pattern) == (("teacher", "") if name == "int4" else ("teacher_sparse", "2:4"))
    small = gpusq_deit_s.get_config("smoke,stage=quantize")
    assert small.teacher.ensemble.sparse.weights == small.teacher.weights == "random"


@pytest.mark.parametrize("name", ["gpusq_vit_small", "gpusq_deit_s"])
def test_a_config_says_how_to_run_it(name):
    text = (ROOT / f"{name}.py").read_text().split('"""')[1]
    for word in ("Command:", "Hardware:", "Published:", f"configs/quantize/{name}.py"):
        assert word in text, f"its docstring lacks {word!r}"
