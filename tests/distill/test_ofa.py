"""OFA-KD's loss from its equations, its branches by parameter counts and taps of every published pair."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import backbones
from research.core.cost import macs
from research.distill import losses, ofa
from research.distill.ofa_branches import Branches, merge_steps

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "ofakd"
COUNTS = json.loads((GOLDEN / "counts.json").read_text())
SHAPES = json.loads((GOLDEN / "feature_shapes.json").read_text())
PAIRS = sorted(name.removeprefix("ofa_extra:") for name in COUNTS if name.startswith("ofa_extra:"))
NETWORKS = sorted({name.split("@")[0] for name in COUNTS} & set(backbones.variants()))
RNG = np.random.default_rng(0)
B, C = 5, 7
STUDENT, TEACHER = (jnp.asarray(RNG.normal(0, 3, (B, C)), jnp.float32) for _ in range(2))
LABELS = jnp.asarray(RNG.integers(0, C, B), jnp.int32)


@functools.cache
def traced(model, classes=1000):
    """(endpoints' shapes with the logits, parameters, multiply-adds) of a published network, by tracing alone."""
    module, found = backbones.create(model, num_classes=classes), {}

    def forward(image):
        (logits, endpoints), variables = module.init_with_output(jax.random.key(0), image)
        found["params"] = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
        endpoints = {**endpoints, "logits": logits}
        found["shapes"] = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in endpoints.items()}
        return logits

    size = 224
    count = macs(forward, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return found["shapes"], found["params"], count


@pytest.mark.parametrize("eps, temperature", [(1.0, 1.0), (1.3, 2.0), (2.5, 0.7)])
def test_loss_is_the_equation_in_both_forms(eps, temperature):
    softmax = lambda z: np.exp(z / temperature) / np.sum(np.exp(z / temperature), -1, keepdims=True)
    own, known = (softmax(np.asarray(z, np.float64)) for z in (STUDENT, TEACHER))
    onehot = np.eye(C)[np.asarray(LABELS)]
    weights = {
        "code": (known + onehot) ** eps - onehot,
        "paper": np.where(onehot > 0, (1 + known) ** eps, known),
    }
    for form, weight in weights.items():
        found = ofa.ofa(STUDENT, TEACHER, LABELS, eps=eps, temperature=temperature, form=form)
        np.testing.assert_allclose(found, -np.sum(weight * np.log(own), -1), rtol=1e-5)


def test_eps_one_is_the_soft_cross_entropy_and_labels_do_not_matter():
    found = ofa.ofa(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(found, losses.LOSSES["kd"](STUDENT, TEACHER, entropy=False), rtol=1e-5)
    np.testing.assert_allclose(found, ofa.ofa(STUDENT, TEACHER, (LABELS + 1) % C), rtol=1e-5)


def test_mixed_labels_stand_for_their_largest_class():
    mixed = 0.6 * jax.nn.one_hot(LABELS, C) + 0.4 * jax.nn.one_hot(LABELS[::-1], C)
    np.testing.assert_array_equal(ofa.ofa(STUDENT, TEACHER, mixed, eps=1.5), ofa.ofa(STUDENT, TEACHER, LABELS, eps=1.5))


def test_a_target_the_teacher_finds_unlikely_keeps_its_digits():
    # (1 + p)^eps - 1 is eps p for small p, which is lost in float32 where 1 is added first.
    teacher = jnp.asarray([[0.0, -20.0]])
    weight = jax.grad(lambda s: -ofa.ofa(s, teacher, jnp.asarray([1]), eps=1.5)[0])(jnp.zeros((1, 2)))[0]
    # The gradient of -sum w_c log q_c at equal logits is (w_0 + w_1)/2 - w: their difference holds w_1 alone.
    exact = jnp.exp(-20.0) * 1.5
    total = ofa.ofa(jnp.asarray([[0.0, -1e4]]), teacher, jnp.asarray([1]), eps=1.5)
    np.testing.assert_allclose(total, exact * 1e4, rtol=1e-4)
    assert np.all(np.isfinite(weight))


@pytest.mark.parametrize("shape", [(1, 2), (B, C)])
@pytest.mark.parametrize("largest", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("form", ofa.FORMS)
def test_gradients_are_finite_at_the_extremes(shape, largest, form):
    teacher = largest * (2 * jax.nn.one_hot(jnp.arange(shape[0]) % shape[1], shape[1]) - 1)
    labels = jnp.zeros(shape[0], jnp.int32)
    for student in (teacher, -teacher, teacher.astype(jnp.bfloat16)):
        loss = lambda s: jnp.mean(ofa.ofa(s, teacher, labels, eps=1.4, form=form))
        value, gradient = jax.value_and_grad(loss)(student)
        assert np.isfinite(value) and np.all(np.isfinite(gradient.astype(jnp.float32)))


def test_eps_may_be_mapped_over():
    values = jax.vmap(lambda eps: ofa.ofa(STUDENT, TEACHER, LABELS, eps=eps))(jnp.asarray([1.0, 1.5]))
    np.testing.assert_allclose(values[1], ofa.ofa(STUDENT, TEACHER, LABELS, eps=1.5), rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name in SHAPES])
def test_stages_are_the_authors_taps(name):
    endpoints = traced(name)[0]
    stages = ofa.stage_names(endpoints)
    declared = {int(k): v["actual"] for k, v in SHAPES[name]["stages"].items() if int(k) > 0}
    found = {}
    for stage, endpoint in stages.items():
        shape = endpoints[endpoint].shape[1:]
        if len(declared[stage]) == 2:
            shape = (math.prod(shape[:-1]), shape[-1])
        else:
            shape = (shape[-1], *shape[:-1])
        found[stage] = list(shape)
    assert found == declared
    assert list(endpoints["pooled"].shape[1:]) == SHAPES[name]["stages"]["-1"]["actual"]


@pytest.mark.parametrize("name", sorted(name for name in COUNTS if name.split("@")[0] in NETWORKS))
def test_networks_of_the_pairs_have_the_official_counts(name):
    model, classes = name.split("@")
    _, params, count = traced(model, int(classes))
    assert (params, count) == (COUNTS[name]["params"], COUNTS[name]["macs"])


@pytest.mark.parametrize("pair", PAIRS)
def test_branches_have_the_published_number_of_parameters(pair):
    names, classes = pair.split("@")
    teacher, student = names.split("->")
    endpoints = [traced(model, int(classes))[0] for model in (student, teacher)]
    params, _ = jax.eval_shape(lambda key: ofa.hint().init(key, *endpoints), jax.random.key(0))
    size = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    entry = COUNTS[f"ofa_extra:{pair}"]
    assert {str(k): size(params[f"stage{k}"]) for k in range(1, 5)} == entry["per_stage"]
    assert size(params) == entry["params"]


@pytest.mark.parametrize("side", [1, 4, 7, 8, 13, 14, 16, 27, 28, 56, 64, 112])
def test_patches_are_merged_towards_seven_by_seven(side):
    expected = max(int(np.log2(side / 7)), 0)
    if side % 2**expected:
        with pytest.raises(ValueError, match="square grid"):
            merge_steps(side**2)
    else:
        assert merge_steps(side**2) == expected


def tokens(count, blocks=6, width=8, seed=0):
    rng = np.random.default_rng(seed)
    found = {
        f"block{k:02d}": jnp.asarray(rng.normal(size=(4, count, width)), jnp.float32) for k in range(1, blocks + 1)
    }
    return found | {"tokens": found["block01"], "pooled": jnp.zeros((4, width)), "logits": jnp.zeros((4, C))}


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_prefix_tokens_pass_the_merging_by_and_answer(prefix):
    branches = Branches(8, 16, C, prefix)
    features = {3: tokens(196 + prefix)["block01"]}
    variables = jax.jit(branches.init)(jax.random.key(0), features)
    apply = jax.jit(lambda x: branches.apply(variables, {3: x})[3])
    plain = apply(features[3])
    assert plain.shape == (4, C)
    # Merging mixes patches of one 2 x 2 neighbourhood: the order of whole neighbourhoods does not matter to the blocks.
    patches = features[3][:, prefix:].reshape(4, 7, 2, 7, 2, 8)[:, ::-1].reshape(4, 196, 8)
    turned = jnp.concatenate([features[3][:, :prefix], patches], axis=1)
    np.testing.assert_allclose(apply(turned), plain, rtol=1e-3, atol=1e-5)
    swapped = features[3][:, ::-1]
    assert float(jnp.max(jnp.abs(apply(swapped) - plain))) > 1e-3 * float(jnp.max(jnp.abs(plain)))


def test_the_hint_is_the_sum_of_the_losses_of_its_branches():
    student, teacher = tokens(17), {"pooled": jnp.zeros((4, 16)), "logits": TEACHER[:4]}
    hint = ofa.hint(stages=(2, 4), student=("block03", "block05"), eps=(1.2, 1.7), temperature=2.0)
    params, state = jax.jit(hint.init)(jax.random.key(0), student, teacher)
    assert set(params) == {"stage2", "stage4"} and state == {"batch_stats": {}}
    found, _ = jax.jit(functools.partial(hint.apply, labels=LABELS[:4]))(params, state, student, teacher)
    apply = jax.jit(Branches(8, 16, C, prefix=1).apply)
    logits = apply({"params": params}, {2: student["block03"], 4: student["block05"]})
    expected = sum(
        jnp.mean(ofa.ofa(logits[k], TEACHER[:4], LABELS[:4], eps=e, temperature=2.0)) for k, e in ((2, 1.2), (4, 1.7))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_branches_of_maps_normalise_in_groups():
    maps = {"stage3": jnp.asarray(RNG.normal(size=(4, 4, 4, 4)), jnp.float32), "pooled": jnp.zeros((4, 6))}
    teacher = {"pooled": jnp.zeros((4, 10)), "logits": TEACHER[:4]}
    build = lambda group: ofa.hint(stages=(3,), group=group)
    params, state = jax.jit(build(None).init)(jax.random.key(0), maps, teacher)

    def apply(group):
        return jax.jit(lambda *seen: build(group).apply(params, state, *seen[:2], labels=seen[2])[0])

    seen = maps, teacher, LABELS[:4]
    halves = sum(apply(None)(*jax.tree.map(lambda x, k=k: x[k : k + 2], seen)) for k in (0, 2)) / 2
    np.testing.assert_allclose(apply(2)(*seen), halves, rtol=1e-4)
    assert abs(float(apply(None)(*seen) - halves)) > 1e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eps": (1.0, 1.2)}, "4 stages take one eps or 4"),
        ({"student": ("block01",)}, "4 stages take one eps or 4"),
        ({"stages": (0, 5)}, "are not among 1, 2, 3, 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ofa.hint(**options)


def test_networks_without_stages_are_told_what_to_name():
    with pytest.raises(ValueError, match="name those of the `student`"):
        ofa.stage_names(tokens(16, blocks=2))
    three = {f"stage{k}": jnp.zeros((2, 4, 4, 3)) for k in (1, 2, 3)} | {"pooled": jnp.zeros((2, 3))}
    with pytest.raises(ValueError, match="no stage 4, only 1, 2, 3"):
        ofa.hint().init(jax.random.key(0), three, {"pooled": jnp.zeros((2, 3)), "logits": jnp.zeros((2, 5))})


def test_labels_and_forms_are_asked_for():
    with pytest.raises(ValueError, match="needs labels"):
        ofa.ofa(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="choose 'code' or 'paper'"):
        ofa.ofa(STUDENT, TEACHER, LABELS, form="official")
