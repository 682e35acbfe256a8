"""Matchings against a loop over pairs in NumPy, and what every step of a reduction must leave true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.token_select import token_select
from research.tokens import matching, moves, ppt

BATCH, WIDTH = 2, 4


def draw(count, width=WIDTH, seed=0):
    return np.random.default_rng(seed).normal(size=(BATCH, count, width)).astype(np.float32)


def merged_by_hand(metric, r, class_token, distill_token):
    """Of one image: lists of the positions that each token afterwards holds, by the words of the paper."""
    count = len(metric)
    r = min(r, (count - class_token - distill_token) // 2)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    pairs = []
    for even in range(0, count, 2):
        odds = [odd for odd in range(1, count, 2) if not (distill_token and odd == 1)]
        if class_token and even == 0 or not odds:
            continue
        nearest = max(odds, key=lambda odd: (unit[even] @ unit[odd], -odd))
        pairs.append((-(unit[even] @ unit[nearest]), even, nearest))
    pairs.sort()
    joined = dict((even, odd) for _, even, odd in pairs[:r])
    left = [even for _, even, _ in pairs[r:]]
    left = sorted([0, *left]) if class_token else left
    groups = [[even] for even in left]
    odds = [[odd, *(even for even in joined if joined[even] == odd)] for odd in range(1, count, 2)]
    return [groups[0], odds[0], *groups[1:], *odds[1:]] if distill_token else groups + odds


def held(step):
    """Of every image: which positions each token afterwards holds, the kept one first."""
    places = np.asarray(moves.destinations(step))
    keep = np.asarray(step.keep)
    return [
        [[k, *(p for p in np.flatnonzero(row == m) if p != k)] for m, k in enumerate(order)]
        for row, order in zip(places, keep, strict=True)
    ]


@pytest.mark.parametrize("count, r", [(9, 3), (10, 4), (7, 100), (4, 1), (2, 1)])
@pytest.mark.parametrize("protected", [(False, False), (True, False), (True, True)])
def test_matching_is_that_of_the_paper(count, r, protected):
    metric = draw(count)
    step = matching.bipartite(metric, r, *protected)
    for image, groups in zip(metric, held(step), strict=True):
        expected = merged_by_hand(image, r, *protected)
        if min(r, (count - sum(protected)) // 2) > 0:
            assert [(g[0], sorted(g)) for g in groups] == [(g[0], sorted(g)) for g in expected]
        else:
            assert groups == [[p] for p in range(count)]


def test_equal_similarities_go_by_position():
    step = matching.bipartite(np.ones((1, 9, 3), np.float32), 2, class_token=True)
    assert step.drop.tolist() == [[2, 4]] and step.keep.tolist() == [[0, 6, 8, 1, 3, 5, 7]]
    assert step.into.tolist() == [[3, 3]]


def test_every_kth_token_takes_in_the_others():
    metric, k = draw(11), 3
    step = matching.kth_bipartite(metric, k)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    for image, places in zip(unit, np.asarray(moves.destinations(step)), strict=True):
        nearest = [int(np.argmax(image[[2, 5, 8]] @ image[p])) for p in range(9)]
        assert places.tolist() == [p // k if p % k == k - 1 else nearest[p] for p in range(9)] + [-1, -1]
    assert matching.kth_bipartite(metric, 1).keep.shape == (BATCH, 11)


def test_random_tokens_join_their_nearest():
    metric = draw(9)
    step = matching.random_bipartite(metric, 4, jax.random.key(3))
    other = matching.random_bipartite(metric, 4, jax.random.key(4))
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    for image, keep, drop, into in zip(unit, *map(np.asarray, step), strict=True):
        assert sorted([*keep, *drop]) == list(range(9))
        np.testing.assert_array_equal(into, np.argmax(image[drop] @ image[keep].T, axis=1))
    assert step.drop.tolist() != other.drop.tolist()


def test_joins_are_sums_means_and_maxima_of_groups():
    x, size = draw(9, 5, 1), np.random.default_rng(2).integers(1, 5, (BATCH, 9)).astype(np.float32)
    step = matching.bipartite(draw(9), 3, class_token=True)
    outputs = {mode: moves.join(x, step, mode) for mode in ("sum", "mean", "amax")}
    merged, sizes = moves.merge(x, step, size)
    for b, groups in enumerate(held(step)):
        for m, group in enumerate(groups):
            for mode, of in (("sum", np.sum), ("mean", np.mean), ("amax", np.max)):
                np.testing.assert_allclose(outputs[mode][b, m], of(x[b, group], axis=0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(merged[b, m], np.average(x[b, group], 0, size[b, group]), rtol=1e-5, atol=1e-6)
            assert sizes[b, m] == size[b, group].sum()
    with pytest.raises(ValueError, match="none of sum, mean, amax"):
        moves.join(x, step, "median")


def every_step():
    """A step of each kind that 9 tokens can take."""
    x, scores = draw(9), jnp.abs(jnp.asarray(draw(9, 1, 5)[..., 0]))
    seen = ppt.Seen(scores.at[:, 0].set(2.0), draw(9, seed=6))
    size = jnp.ones((BATCH, 9))
    variance = jnp.var(seen.scores[:, 1:], axis=1, ddof=1)
    return {
        "pool": ppt.step(x, size, seen, 3, 0.0, "pool").moves,
        "prune": ppt.step(x, size, seen, 3, 0.0, "prune").moves,
        "adaptive": ppt.step(x, size, seen, 3, float(jnp.mean(variance))).moves,
        "fuse": token_select(x, scores[:, 1:], 5, fuse=True).moves,
        "distilled": matching.bipartite(seen.metric, 3, True, True),
        "kth": matching.kth_bipartite(x, 4),
    }


@pytest.mark.parametrize("name", every_step())
def test_tokens_are_moved_merged_or_lost_and_never_doubled(name):
    step = every_step()[name]
    places = moves.destinations(step)
    count = int(jnp.max(places)) + 1
    source = np.asarray(moves.source(places, count))
    lost = np.asarray(places) < 0
    np.testing.assert_array_equal(source.sum(axis=1), np.where(lost, 0, 1))
    np.testing.assert_array_equal(moves.sizes(places, count).sum(axis=1), 9 - lost.sum(axis=1))
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(places), np.asarray(step.keep), 1)[0], range(len(step.keep[0]))
    )


def test_two_steps_follow_each_other_and_are_undone():
    x = draw(12)
    first = matching.bipartite(x, 3, class_token=True)
    y, size = moves.merge(x, first)
    order = moves.ranked(y[..., 0])
    second = moves.lost(order[:, :6], order[:, 6:])
    origin = moves.follow(moves.destinations(first), second)
    back = np.asarray(moves.unmerge(moves.rows(y, second.keep), origin))
    one, two = np.asarray(moves.destinations(first)), np.asarray(moves.destinations(second))
    for b in range(BATCH):
        for p in range(12):
            at = two[b, one[b, p]]
            assert origin[b, p] == at
            np.testing.assert_array_equal(back[b, p], y[b, one[b, p]] if at >= 0 else 0 * back[b, p])
    assert float(jnp.sum(size)) == BATCH * 12


def test_prune_and_pool_are_chosen_by_image():
    x, size = jnp.asarray(draw(9)), jnp.asarray(np.random.default_rng(3).integers(1, 4, (BATCH, 9)), jnp.float32)
    scores = jnp.stack([jnp.full(8, 1 / 8), jnp.asarray([0.02, 0.5, 0.1, 0.02, 0.1, 0.02, 0.12, 0.12])])
    seen = ppt.Seen(jnp.concatenate([jnp.full((2, 1), 2.0), scores], 1), jnp.asarray(draw(9, seed=4)))
    run = lambda policy, threshold=1e-3: ppt.step(x, size, seen, 3, threshold, policy)
    adaptive, reverse, prune, pool = (run(policy) for policy in ppt.POLICIES[:1] + ("reverse", "prune", "pool"))
    np.testing.assert_allclose(adaptive.variance, np.var(np.asarray(scores), axis=1, ddof=1), rtol=1e-5, atol=1e-9)
    assert adaptive.pruned.tolist() == [False, True] and reverse.pruned.tolist() == [True, False]
    for found, images in ((adaptive, (pool, prune)), (reverse, (prune, pool))):
        for b, expected in enumerate(images):
            np.testing.assert_allclose(found.x[b], expected.x[b], rtol=1e-6)
            np.testing.assert_array_equal(found.size[b], expected.size[b])
    assert prune.moves.keep[1].tolist() == [0, 2, 7, 8, 3, 5]  # by descending score, equal ones by position
    assert run("adaptive", float(adaptive.variance[1])).pruned[1] and not run("adaptive", 1.0).pruned.any()


def test_a_fused_token_is_the_weighted_sum_of_what_it_replaces():
    x, scores = draw(7), jnp.abs(jnp.asarray(draw(6, 1, 5)[..., 0]))
    tokens, _, step = token_select(x, scores, 4, fuse=True)
    order = np.argsort(-np.asarray(scores), axis=1)
    for b in range(BATCH):
        np.testing.assert_array_equal(tokens[b, :5], x[b, [0, *(order[b, :4] + 1)]])
        rest = order[b, 4:]
        np.testing.assert_allclose(tokens[b, 5], np.asarray(scores)[b, rest] @ x[b, rest + 1], rtol=1e-5, atol=1e-6)
    assert token_select(x, scores, 4).x.shape == (BATCH, 5, WIDTH) and step.into.tolist() == [[5, 5]] * BATCH


def test_scores_that_are_not_numbers():
    scores = jnp.asarray([[0.1, jnp.nan, 0.3, jnp.inf]])
    assert moves.ranked(scores).tolist() == [[3, 2, 0, 1]]
    with pytest.raises(ValueError, match="scores are not all finite"):
        moves.finite("scores", scores)
    assert jax.eval_shape(lambda s: moves.finite("scores", s), scores).shape == scores.shape
    zero = np.zeros((1, 6, 3), np.float32)
    assert sorted(held(matching.bipartite(zero, 2, True))[0][0]) == [0]


def test_a_distillation_token_without_class_token_is_refused():
    with pytest.raises(ValueError, match="needs class_token=True"):
        matching.bipartite(draw(9), 2, distill_token=True)
