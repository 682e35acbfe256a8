"""DynamicViT: masked and gathered forms agree, decisions are what they claim, losses, names and counts."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import backbones
from research.backbones import vit
from research.core import sharding
from research.core.cost import params_count
from research.distill import logits as distill
from research.port import names
from research.tokens import dynamicvit, dynamicvit_losses, moves, policies, policy_macs

COUNTS = pathlib.Path(__file__).parents[1] / "golden" / "token_reduction" / "counts.json"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
AT = {"at": (1, 2), "keep": 0.6}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, 32, 32, 3))


@pytest.fixture(scope="module")
def variables(images):
    variables = jax.jit(vit.build(**TINY, reduce=dynamicvit.reduction(**AT)).init)(jax.random.key(0), images[:1])
    return jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, variables)


@functools.cache
def network(**changes):
    return vit.build(**TINY, reduce=dynamicvit.reduction(**{**AT, **changes}))


@pytest.fixture(scope="module")
def evaluated(variables, images):
    return jax.jit(network().apply)(variables, images)


def test_masked_and_gathered_forms_are_the_same(variables, images, evaluated):
    logits, endpoints = evaluated
    masked, everything = jax.jit(network(masked=True).apply)(variables, images)
    assert [endpoints[f"block{b:02d}"].shape[1] for b in (1, 2, 3)] == [17, 10, 6]
    assert everything["tokens"].shape[1] == 17
    np.testing.assert_allclose(masked, logits, rtol=1e-4, atol=1e-4)
    held = (endpoints["origin"] >= 0).astype(jnp.float32)
    np.testing.assert_array_equal(held[:, 1:], everything["block03_decision"])
    places = moves.unmerge(endpoints["tokens"], endpoints["origin"])
    np.testing.assert_allclose(everything["tokens"] * held[..., None], places, rtol=1e-3, atol=1e-3)


def test_kept_patches_are_the_best_in_descending_order(evaluated):
    _, endpoints = evaluated
    for name, count in (("block02", 9), ("block03", 5)):
        scores, kept = endpoints[f"{name}_log_probs"][..., 0], endpoints[f"{name}_kept"]
        np.testing.assert_array_equal(kept, jax.lax.top_k(scores, count)[1])


@pytest.fixture(scope="module")
def trained(variables, images):
    """What computes ((loss terms, endpoints), gradients) of a training pass, and that of one key."""

    def loss(params, images, key):
        logits, ends = network().apply({"params": params}, images, train=True, rngs={"dropout": key})
        teacher = jnp.zeros_like(logits), jnp.zeros_like(ends["tokens"][:, 1:])
        decisions = [ends["block02_decision"], ends["block03_decision"]]
        student = logits, ends["tokens"][:, 1:]
        value, terms = dynamicvit_losses.total(jnp.zeros(8), student, teacher, decisions, (0.6, 0.36))
        return value, (terms, ends)

    run = jax.jit(jax.grad(loss, has_aux=True))
    return run, *run(variables["params"], images, jax.random.key(2))


def test_training_keeps_all_tokens_and_gradients_reach_the_predictors(trained):
    _, gradients, (_, endpoints) = trained
    assert endpoints["tokens"].shape == (8, 17, 16)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradients))
    for stage in (0, 1):
        assert float(jnp.max(jnp.abs(gradients[f"score_predictor_{stage}"]["in_conv_1"]["kernel"]))) > 0


def test_what_was_dropped_stays_dropped_and_draws_differ(trained, variables, images):
    run, _, (_, endpoints) = trained
    other = run(variables["params"], images, jax.random.key(3))[1][1]
    first, second = endpoints["block02_decision"], endpoints["block03_decision"]
    assert set(np.unique(first)) == {0.0, 1.0} and np.all(second <= first) and np.any(second < first)
    assert not np.array_equal(first, other["block02_decision"])


def test_a_batch_over_eight_devices_draws_and_learns_the_same(trained, variables, images):
    run, gradients, (terms, endpoints) = trained
    mesh = sharding.mesh({"data": 8})
    placed = jax.device_put(images, sharding.batch_sharding(mesh))
    params = jax.device_put(variables["params"], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    again, (same, ends) = run(params, placed, jax.random.key(2))
    np.testing.assert_array_equal(ends["block03_decision"], endpoints["block03_decision"])
    np.testing.assert_allclose(same["token"], terms["token"], rtol=1e-4)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)
    jax.tree.map(close, jax.device_get(again), jax.device_get(gradients))


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_goes_through_without_promotion(variables, images, train):
    def loss(params):
        model = network().clone(dtype=jnp.bfloat16)
        logits, ends = model.apply({"params": params}, images, train=train, rngs={"dropout": jax.random.key(0)})
        return jnp.sum(logits.astype(jnp.float32)), (logits, ends)

    gradients, (logits, ends) = jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"])
    assert logits.dtype == ends["tokens"].dtype == jnp.bfloat16 and ends["block02_log_probs"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


def test_decisions_follow_the_probabilities_and_carry_the_softmax_gradient():
    log_probs = jnp.log(jnp.asarray([[[0.2, 0.8], [0.7, 0.3]]]))
    noise = jax.random.gumbel(jax.random.key(0), (4000, 2, 2))
    many = dynamicvit.decide(jnp.broadcast_to(log_probs, noise.shape), noise, jnp.ones((4000, 2)))
    np.testing.assert_allclose(many.mean(0), [0.2, 0.7], atol=0.03)
    hard = lambda p: dynamicvit.decide(p, noise[:1], jnp.asarray([[1.0, 0.0]])).sum()
    soft = lambda p: jax.nn.softmax(p + noise[:1])[0, 0, 0]
    gradient, soft = jax.jit(lambda p: (jax.grad(hard)(p), jax.grad(soft)(p)))(log_probs)
    np.testing.assert_allclose(gradient, soft, rtol=1e-6)


def test_attention_under_a_policy():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, 6, 4))
    scores = q @ k.swapaxes(-1, -2) / 2
    ones, policy = jnp.ones((2, 6)), jnp.ones((2, 6)).at[:, 4].set(0)
    np.testing.assert_allclose(policies.softmax(scores, ones), jax.nn.softmax(scores), atol=2e-6)
    weights = policies.softmax(scores, policy)
    np.testing.assert_allclose(policies.attend(q, k, v, policy), weights @ v, rtol=1e-5, atol=1e-6)
    others = np.delete(np.asarray(weights), 4, axis=2)
    assert np.all(others[..., 4] < 1e-6) and np.all(weights[:, :, 4, 4] > 1e-3)
    low = policies.attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), policy)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), weights @ v, atol=0.05)


def test_an_image_that_keeps_nothing_stays_finite():
    predictor, x = dynamicvit.Predictor(), jax.random.normal(jax.random.key(0), (2, 5, 8))
    policy = jnp.asarray([[0.0] * 5, [1.0] * 5])

    @jax.jit
    def run(policy):
        variables = predictor.init(jax.random.key(1), x, policy)
        return jax.value_and_grad(lambda p: predictor.apply(variables, x, p).sum())(policy)

    value, gradient = run(policy)
    assert bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(gradient)))
    with pytest.raises(ValueError, match="6 do not divide"):
        jax.eval_shape(predictor.init, jax.random.key(1), x[..., :6], policy)


def test_losses():
    student, teacher = jax.random.normal(jax.random.key(0), (2, 3, 7, 5))
    mask = jnp.zeros((3, 7)).at[1, 2:4].set(1.0)

    @jax.jit
    def found(student, teacher, mask):
        mse, kl = (dynamicvit_losses.token(student, teacher, mask, kind) for kind in ("mse", "kl"))
        none = jax.value_and_grad(lambda s: dynamicvit_losses.token(s, teacher, 0 * mask, "kl"))(student)
        first = dynamicvit_losses.distillation(student[:, 0], teacher[:, 0])
        return mse, kl, first, none, dynamicvit_losses.ratio([mask, mask], (0.0, 1.0))

    @jax.jit
    def expected(student, teacher):
        kept = student[1, 2:4], teacher[1, 2:4]
        return (
            jnp.mean(jnp.square(kept[0] - kept[1])),
            distill.kd(*kept).mean(),
            distill.kd(student[:, 0], teacher[:, 0]),
        )

    mse, kl, first, none, ratio = found(student, teacher, mask)
    for got, value in zip((mse, kl, first), expected(student, teacher), strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-5)
    assert float(none[0]) == 0 and not np.any(none[1])
    np.testing.assert_allclose(ratio, [0.5, ((2 / 7) ** 2 + (5 / 7) ** 2) / 2, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match="one rate a stage"):
        dynamicvit_losses.ratio([mask], (0.5, 0.2))
    with pytest.raises(ValueError, match="neither 'mse' nor 'kl'"):
        dynamicvit_losses.token(student, teacher, mask, "l1")


def test_the_hint_is_every_term_but_the_labels_in_groups_of_examples():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    student, teacher = ({"logits": draw(4, 5), "tokens": draw(4, 8, 3)} for _ in range(2))
    # Unequal numbers of kept patches: the mean over a group is not that over the batch.
    student |= {"block03_decision": (np.arange(28) % 5 > 1).reshape(4, 7).astype(np.float32)}
    student |= {
        "block07_decision": np.tril(student["block03_decision"], 2),
        "block03_log_probs": 0,
        "block07_log_probs": 0,
    }

    def total(rows):
        seen = [(found["logits"][rows], found["tokens"][rows, 1:]) for found in (student, teacher)]
        decisions = [student[f"block{block}_decision"][rows] for block in ("03", "07")]
        return dynamicvit_losses.total(jnp.zeros(()), *seen, decisions, (0.7, 0.49), ratio_weight=5.0)[0]

    @jax.jit
    def found():
        whole, halved = (dynamicvit_losses.hint(ratio_weight=5.0, group=group)[1] for group in (None, 2))
        halves = total(slice(2)), total(slice(2, 4))
        return whole({}, {}, student, teacher)[0], total(slice(4)), halved({}, {}, student, teacher)[0], sum(halves) / 2

    whole, expected, halved, mean = found()
    np.testing.assert_allclose((whole, halved), (expected, mean), rtol=1e-5)
    assert abs(float(whole) - float(halved)) > 1e-3
    assert dynamicvit_losses.hint()[0](None, student, teacher) == ({}, {})
    for options, endpoints, message in (
        ({}, teacher, "the student has 0 predictors of DynamicViT and the loss keep=0.7"),
        ({"keep": (0.5,)}, student, "has 2 predictors of DynamicViT and the loss keep=1 rates"),
    ):
        with pytest.raises(ValueError, match=message):
            dynamicvit_losses.hint(**options)[0](None, endpoints, teacher)


def test_official_names(variables):
    state = names.to_official(variables, (*dynamicvit.NAMES, *vit.NAMES["official"]))
    assert state["score_predictor.1.out_conv.4.weight"].shape == (2, 4)
    assert {"score_predictor.0.in_conv.0.bias", "score_predictor.0.in_conv.1.weight", "blocks.2.norm1.bias"} <= set(
        state
    )


@pytest.mark.parametrize("size, width, heads", [("small", 384, 6), ("base", 768, 12)])
def test_counts_are_exact(size, width, heads):
    entry = json.loads(COUNTS.read_text())[f"dynamicvit_deit_{size}_rho0.7"]
    model = backbones.create(f"deit_{size}_patch16_224", reduce=dynamicvit.reduction())
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    (_, endpoints), found = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), image)
    assert params_count(found["params"]) == entry["params"]
    assert [endpoints[f"block{b:02d}"].shape[1] for b in (3, 4, 7, 10)] == [197, 138, 97, 68]
    assert policy_macs.dynamicvit(width, heads) == entry["macs"]


def test_impossible_requests_are_explained():
    for options, message in (
        ({"keep": 0.0}, r"rates lie in \(0, 1\]"),
        ({"keep": (0.5, 0.6, 0.4)}, "do not grow"),
        ({"keep": (0.5, 0.4)}, "3 stages take one rate, or 3"),
        ({"at": (6, 3, 9)}, "ascending"),
    ):
        with pytest.raises(ValueError, match=message):
            dynamicvit.reduction(**options)
    with pytest.raises(ValueError, match="leaves none of 16"):
        dynamicvit.reduction((1,), 0.05).bind(3, 16, True, False)
    with pytest.raises(ValueError, match="3 blocks, counted from 0"):
        dynamicvit.reduction((1, 3), 0.5).bind(3, 16, True, False)
