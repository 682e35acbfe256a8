"""ATS against its published formulas, and what padding must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import vit
from research.tokens import ats, moves

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}


def published(scores: np.ndarray, reference: int) -> np.ndarray:
    """Positions that survive of P scores, by the official code's steps; `reference` tokens with the class token."""
    order = np.argsort(scores, kind="stable")
    cdf = np.cumsum(scores[order])
    cdf = (cdf - cdf.min()) / (cdf.max() - cdf.min())
    start = np.where(cdf == 0, 1e8, cdf).min()
    line = np.linspace(0, 1, reference - 1)
    steps = start + (line * (reference - 2) - start * np.arange(reference - 1)) / (reference - 2)
    padding = reference - 1 - len(scores)
    padded = np.concatenate([np.zeros(padding), cdf]) if padding >= 0 else cdf[-padding:]
    return order[np.unique(np.abs(steps[:, None] - padded[None]).argmin(1) - padding)]


sample = jax.jit(ats.sample, static_argnames=("count", "most"))


def survivors(sample: ats.Sample, image: int = 0) -> np.ndarray:
    return np.asarray(sample.order[image])[np.asarray(sample.kept[image])]


@pytest.mark.parametrize("patches, reference", [(16, 17), (10, 17), (20, 17), (40, 8), (5, 3)])
def test_survivors_are_the_published_ones(patches, reference):
    scores = np.random.default_rng(patches).dirichlet(np.full(patches, 0.3), 12).astype(np.float32)
    found = sample(scores, reference - 1)
    for image, row in enumerate(scores):
        np.testing.assert_array_equal(survivors(found, image), published(row.astype(np.float64), reference))
    # The order names every patch once, survivors first.
    np.testing.assert_array_equal(np.sort(found.order, axis=1), np.tile(np.arange(patches), (12, 1)))
    assert np.all(np.diff(found.kept.astype(int), axis=1) <= 0)


def test_even_scores_leave_more_tokens_than_peaked_ones():
    peaked = jnp.full((16,), 0.001).at[3].set(1.0)
    found = sample(jnp.stack([jnp.linspace(0.9, 1.1, 16), peaked]), 16)
    assert int(found.kept[0].sum()) > 10 and list(survivors(found, 1)[-1:]) == [3] and int(found.kept[1].sum()) < 4


def test_padding_changes_nothing_and_degenerate_scores_keep_one():
    scores = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(9), 1), jnp.float32)
    padded = jnp.concatenate([jnp.full((1, 4), 7.0), scores], axis=1)
    valid = (jnp.arange(13) >= 4)[None]
    np.testing.assert_array_equal(survivors(sample(padded, 16, valid=valid)) - 4, survivors(sample(scores, 16)))
    lone = sample(jnp.ones((1, 5)), 5, valid=jnp.arange(5)[None] == 2)
    assert survivors(lone).tolist() == [2]
    assert survivors(sample(jnp.zeros((1, 4)), 4)).size == 1


def test_most_drops_the_worst_survivors():
    scores = jnp.asarray(np.random.default_rng(3).dirichlet(np.ones(12), 2), jnp.float32)
    every, few = sample(scores, 12), sample(scores, 12, most=3)
    for image in range(2):
        np.testing.assert_array_equal(survivors(few, image), survivors(every, image)[-3:])


@pytest.fixture(scope="module")
def network():
    """(images, variables, the logits and endpoints of a network that samples in its last two blocks)."""
    # Images of other contrast attend more or less evenly, and keep other numbers of tokens.
    contrast = jnp.asarray([0.1, 1.0, 4.0, 16.0])[:, None, None, None]
    images = contrast * jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = jax.jit(vit.build(**TINY).init)(jax.random.key(0), images[:1])
    variables = jax.tree.map(lambda x: 12 * x if x.ndim > 1 else x, variables)
    return images, variables, jax.jit(vit.build(**TINY, reduce=ats.reduction(at=(2, 3))).apply)(variables, images)


def test_arrays_as_long_as_the_longest_image_give_the_same_logits(network):
    images, variables, (logits, endpoints) = network
    longest = tuple(int(endpoints[f"block{b:02d}_size"].sum(1).max()) - 1 for b in (3, 4))
    assert max(longest) < 16 and len(set(np.asarray(endpoints["block03_size"].sum(1)))) > 1
    shorter = vit.build(**TINY, reduce=ats.reduction(at=(2, 3), most=longest))
    again, fewer = jax.jit(shorter.apply)(variables, images)
    assert fewer["tokens"].shape[1] == longest[1] + 1
    np.testing.assert_allclose(again, logits, rtol=2e-5, atol=2e-5)
    # Survivors go to the places that `origin` says, and only they do.
    for ends in (endpoints, fewer):
        np.testing.assert_array_equal((ends["origin"] >= 0).sum(1), ends["size"].sum(1))
    restored = [moves.unmerge(ends["tokens"], ends["origin"]) for ends in (endpoints, fewer)]
    np.testing.assert_allclose(*restored, rtol=2e-4, atol=2e-5)


def test_an_image_is_reduced_as_if_it_were_alone(network):
    images, variables, (logits, _) = network
    alone = jax.jit(vit.build(**TINY, reduce=ats.reduction(at=(2, 3))).apply)
    np.testing.assert_allclose(alone(variables, images[2:3])[0], logits[2:3], rtol=2e-5, atol=2e-5)


def test_gradients_past_padding_are_finite_in_bfloat16():
    reduce = ats.reduction(at=(1, 2)).bind(4, 5, True, False)
    size = jnp.asarray([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]])
    tokens = reduce.start(jnp.zeros((1, 6, 8), jnp.bfloat16))._replace(size=size)
    parts = jax.random.normal(jax.random.key(0), (3, 1, 2, 6, 4), jnp.bfloat16)

    def loss(parts):
        y, scores = reduce.attend(tokens, 2, True, *parts, None, None)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), (y, scores)

    gradient, (y, scores) = jax.jit(jax.grad(loss, has_aux=True))(parts)
    assert y.dtype == jnp.bfloat16 and scores.dtype == jnp.float32
    assert bool(jnp.all(jnp.isfinite(gradient))) and not np.any(gradient[1:, :, :, 4:]) and not np.any(scores[0, 3:])
    model = vit.build(**TINY, reduce=reduce, dtype=jnp.bfloat16)
    (logits, _), _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x), jnp.zeros((1, 32, 32, 3)))
    assert logits.dtype == jnp.bfloat16


def test_impossible_requests_are_explained():
    for options, message in (
        ({"at": ()}, "one block or more"),
        ({"at": (3, 2)}, "ascending"),
        ({"most": 0}, "at least one patch"),
        ({"at": (1, 2), "most": (4,)}, "one for each of 2 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            ats.reduction(**options)
    with pytest.raises(ValueError, match="4 blocks, counted from 0"):
        ats.reduction(at=(4,)).bind(4, 16, True, False)
    with pytest.raises(ValueError, match="class_token=True"):
        ats.reduction(at=(1,)).bind(4, 16, False, False)
    with pytest.raises(ValueError, match="two steps or more"):
        ats.sample(jnp.ones((1, 4)), 1)
