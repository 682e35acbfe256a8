"""Mixup and cutmix: official numbers, distributions of the draws, and one meaning on one device or many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from research.core import scope
from research.data import mixup
from research.port import verify

B, H, W, C = 16, 12, 10, 7
IMAGES = jnp.asarray(np.random.default_rng(0).random((B, H, W, 3)), jnp.float32)
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, C, B), jnp.int32)
OPTIONS = dict(num_classes=C, mixup_alpha=0.8, cutmix_alpha=1.0, smoothing=(0.0, 0.1))


@functools.cache
def mix(group=None):
    return jax.jit(functools.partial(mixup.mix, group=group, **OPTIONS))


@functools.cache
def draw(**options):
    options = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "prob": 1.0, "switch_prob": 0.5, **options}
    return jax.jit(jax.vmap(lambda key: mixup.draw(key, H, W, **options)))


def draws(count=4000, **options):
    return [np.asarray(x) for x in draw(**options)(jax.random.split(jax.random.key(3), count))]


def mixed_by_hand(key, images, labels):
    """The batch mixed in NumPy with the draw that belongs to a key."""
    [weight], [lam] = draw(mixup_alpha=0.8, cutmix_alpha=1.0)(key[None])
    weight, images = np.asarray(weight)[:, :, None], np.asarray(images)
    one_hot = np.eye(C)[np.asarray(labels)]
    targets = [float(lam) * y + (1 - float(lam)) * y[::-1] for y in (one_hot, 0.9 * one_hot + 0.1 / C)]
    return weight * images + (1 - weight) * images[::-1], targets


def assert_mixed(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got, (expected[0], tuple(expected[1])))


def test_golden(golden):
    with jax.enable_x64(True):
        passed, line = verify.check(golden / "vanillakd" / "mixup_cutmix.npz")
    assert passed, line


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_mixup_lam_is_beta(alpha):
    weight, lam = draws(mixup_alpha=alpha)
    assert np.all((lam >= 0) & (lam <= 1)) and np.all(weight == lam[:, None, None])
    # At points, since close to 1 a float32 rounds what is continuous.
    points = np.array([1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
    np.testing.assert_allclose((lam[:, None] < points).mean(0), stats.beta(alpha, alpha).cdf(points), atol=0.025)


def test_cutmix_boxes_cover_what_timm_s_do_and_lam_is_their_area():
    weight, lam = draws(cutmix_alpha=1.0)
    np.testing.assert_allclose(weight.mean(axis=(1, 2)), lam, atol=1e-6)
    assert set(np.unique(weight)) == {0.0, 1.0}
    rng, covered = np.random.default_rng(0), np.zeros((H, W))
    for _ in range(4000):
        share = np.sqrt(1 - rng.uniform())
        (cy, h), (cx, w) = ((rng.integers(size), int(size * share) // 2) for size in (H, W))
        covered[max(cy - h, 0) : cy + h, max(cx - w, 0) : cx + w] += 1 / 4000
    np.testing.assert_allclose(1 - weight.mean(axis=0), covered, atol=0.04)
    holes = [np.argwhere(w == 0) for w in weight if (w == 0).any()]
    assert all(len(hole) == np.prod(hole.max(0) - hole.min(0) + 1) for hole in holes)  # solid rectangles


def test_both_kinds_are_drawn_with_the_switch_probability():
    weight, _ = draws(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.25)
    cut = [set(np.unique(w)) <= {0.0, 1.0} for w in weight]
    assert np.mean(cut) == pytest.approx(0.25, abs=0.03)


def test_probability_of_mixing_at_all():
    _, lam = draws(mixup_alpha=1.0, prob=0.3)
    assert np.mean(lam < 1) == pytest.approx(0.3, abs=0.03)


def test_cutmix_box_is_as_stated():
    box = jax.jit(lambda key, lam: mixup.cutmix_box(key, lam, 100, 60))
    for seed in range(20):
        top, bottom, left, right = (int(v) for v in box(jax.random.key(seed), jnp.float32(0.75)))
        assert 0 <= top <= bottom <= 100 and 0 <= left <= right <= 60
        if 0 < top and bottom < 100:
            assert bottom - top == 50  # sqrt(1 - 0.75) of 100
        if 0 < left and right < 60:
            assert right - left == 30


@pytest.mark.parametrize("seed", range(6))
def test_batch_is_mixed_with_its_reverse_by_one_draw(seed):
    key = jax.random.key(seed)
    got = mix()(key, IMAGES, LABELS)
    assert_mixed(got, mixed_by_hand(key, IMAGES, LABELS))
    np.testing.assert_allclose(got[1][1].sum(axis=1), 1.0, atol=1e-5)


def test_groups_mix_within_themselves_with_their_own_draws():
    key = jax.random.key(5)
    images, targets = mix(2)(key, IMAGES, LABELS)
    for number in range(B // 2):
        rows = slice(2 * number, 2 * number + 2)
        expected = mixed_by_hand(jax.random.fold_in(key, number), IMAGES[rows], LABELS[rows])
        assert_mixed((images[rows], tuple(t[rows] for t in targets)), expected)


@pytest.mark.parametrize("group", [None, 2])
def test_pmap_means_the_global_batch(group):
    def share(key, images, labels):
        with scope.batch_axis("data"):
            return mixup.mix(key, images, labels, group=group, **OPTIONS)

    split = lambda x: x.reshape(8, B // 8, *x.shape[1:])
    parts = jax.pmap(share, axis_name="data")(jnp.stack([jax.random.key(6)] * 8), split(IMAGES), split(LABELS))
    whole = mix(group)(jax.random.key(6), IMAGES, LABELS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.reshape(b.shape), b, atol=2e-6), parts, whole)


def test_sharded_batch_gives_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    key = jax.random.key(7)
    many = mix()(key, jax.device_put(IMAGES, sharding), jax.device_put(LABELS, sharding))
    assert_mixed(many, mixed_by_hand(key, IMAGES, LABELS))


def test_nothing_on_leaves_images_and_smooths_labels():
    images, target = mixup.mix(jax.random.key(0), IMAGES, LABELS, num_classes=C, smoothing=0.1)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_allclose(target, 0.9 * np.eye(C)[np.asarray(LABELS)] + 0.1 / C, atol=1e-6)


def test_bfloat16_images_stay_bfloat16_and_targets_float32():
    low = IMAGES.astype(jnp.bfloat16)
    images, targets = jax.eval_shape(mix(), jax.random.key(8), low, LABELS)
    assert images.dtype == jnp.bfloat16 and targets[0].dtype == targets[1].dtype == jnp.float32
    mixed = mixup.mixup(low, 0.3)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed.astype(jnp.float32), mixup.mixup(IMAGES, 0.3), atol=0.02)


def test_odd_batches_pair_the_middle_with_itself():
    np.testing.assert_allclose(mixup.mixup(IMAGES[:3], 0.25)[1], IMAGES[1], atol=1e-6)


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="float images, got uint8"):
        mixup.mix(jax.random.key(0), IMAGES.astype(jnp.uint8), LABELS, **OPTIONS)
    with pytest.raises(ValueError, match="16 examples .* groups of 5"):
        mixup.mix(jax.random.key(0), IMAGES, LABELS, group=5, **OPTIONS)
