"""Hint methods through their common interface, and the batch that losses see on one device and on several."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import scope
from research.distill import losses, relations, taps

B, N, DEVICES = 8, 16, 4
RNG = np.random.default_rng(0)


def endpoints(widths, sides, preact=False, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    found = {}
    for level, (width, side) in enumerate(zip(widths, sides, strict=True), 1):
        found[f"stage{level}"] = draw(B, side, side, width)
        if preact:
            found[f"stage{level}_preact"] = draw(B, side, side, width)
    for level in range(1, 5):
        found[f"block{level:02d}"] = draw(B, 10, widths[-1])
    # Maps that are equally wide in both networks.
    found |= {"twin1": draw(B, 4, 4, 5), "twin2": draw(B, 2, 2, 5)}
    return {**found, "pooled": draw(B, widths[-1]), "logits": draw(B, 5)}


STUDENT = endpoints((3, 6), (4, 2), preact=True, seed=1)
TEACHER = endpoints((4, 7), (4, 2), seed=2)
TWINS = {"student": ("twin1", "twin2"), "teacher": ("twin1", "twin2")}
INDEX = jnp.asarray(RNG.permutation(N)[:B], jnp.int32)
OPTIONS = {
    "fitnet": {},
    "cc": {"dim": 4},
    "rkd": {},
    "crd": {"num_examples": N, "classes": np.arange(N) % 3, "dim": 4, "negatives": 6},
    "review": {"max_mid": 5, "warmup_epochs": 0},
    "ofa": {"stages": (1, 2)},
    "gpt4image": {"teacher": "pooled"},
    **dict.fromkeys(("at", "at_paper", "nst", "ab", "vid", "ofd", "mgd", "vitkd", "sp", "pkt", "ctkd"), {}),
    "fsp": TWINS,
    "kdsvd": TWINS,
    "srrl": {"kernel": RNG.normal(size=(7, 5)).astype(np.float32), "bias": np.zeros(5, np.float32)},
    "ft": {"init_epochs": 1},
    "manifold": {"sample": 7},
    "uskd": {"student": "stage2"},
    "discriminator": {"reduction": 2},
}
# Those whose value depends on the batch they are given, or whose adaptors have batch norms.
GROUPED = tuple(name for name in OPTIONS if "group" in inspect.signature(losses.HINTS[name]).parameters)


def build(name, **options):
    return losses.pick(losses.HINTS, name)(**{**OPTIONS[name], **options})


@functools.cache
def state_of(name):
    return jax.jit(build(name).init)(jax.random.key(0), STUDENT, TEACHER)


def gradient(hint, params, state, student, teacher, index):
    def loss(params, student):
        extra = {"labels": index % 5, "index": index, "key": jax.random.key(3), "epoch": 2}
        return hint.apply(params, state, student, teacher, **extra)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, student)


@functools.cache
def on_one_device(name):
    return jax.jit(functools.partial(gradient, build(name)))(*state_of(name), STUDENT, TEACHER, INDEX)


def on_several(function, *arrays, devices=DEVICES):
    """`function` of arrays split over `devices` mapped ones; the first two arguments of `arrays` are replicated."""
    fixed, split = arrays[:2], arrays[2:]
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), split)

    def share(*arguments):
        with scope.batch_axis("data"):
            return function(*arguments)

    return jax.pmap(share, "data", in_axes=(None, None, *[0] * len(split)), devices=jax.devices()[:devices])(
        *fixed, *split
    )


def close(a, b, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **{"rtol": 2e-4, "atol": 1e-6, **tolerance}), a, b)


@pytest.mark.parametrize("name", losses.HINTS)
def test_every_hint_trains_the_student_and_its_adaptors(name):
    (loss, state), (params_gradient, student_gradient) = on_one_device(name)
    assert loss.shape == () and np.isfinite(loss) and loss > 0
    leaves = jax.tree.leaves(params_gradient)
    assert all(np.all(np.isfinite(g)) for g in leaves)
    assert any(np.any(g) for g in jax.tree.leaves(student_gradient))
    before = state_of(name)[1]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), before)


@pytest.mark.parametrize("name", losses.HINTS)
def test_init_needs_shapes_only(name):
    shapes = jax.eval_shape(lambda: (STUDENT, TEACHER))
    small = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), shapes)
    init = build(name, **({"group": 4} if name in GROUPED else {})).init
    found = jax.eval_shape(lambda key: init(key, *small), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, found) == jax.tree.map(lambda x: x.shape, state_of(name))


@pytest.mark.parametrize("name", losses.HINTS)
def test_losses_of_bfloat16_endpoints_are_float32(name):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (STUDENT, TEACHER))
    extra = {"labels": INDEX % 5, "index": INDEX, "key": jax.random.key(3), "epoch": jnp.ones((), jnp.int32)}
    apply = functools.partial(build(name).apply, **extra)
    loss, state = jax.eval_shape(apply, *state_of(name), *low)
    assert loss.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, state_of(name)[1])


@pytest.mark.parametrize("name", losses.HINTS)
def test_several_devices_give_the_loss_state_and_gradient_of_one(name):
    (loss, state), (params_gradient, student_gradient) = on_one_device(name)

    def share(params, state, student, teacher, index):
        (loss, state), (params, student) = gradient(build(name), params, state, student, teacher, index)
        return scope.mean((loss, state, params)), student

    (losses_, states, grads), student = on_several(share, *state_of(name), STUDENT, TEACHER, INDEX)
    close(losses_, jnp.full(DEVICES, loss))
    close(jax.tree.map(lambda x: x[-1], (states, grads)), (state, params_gradient))
    # Each device's loss is its share of the mean, so its students' gradients are DEVICES times as large before pmean.
    student = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]) / DEVICES, student)
    close(student, student_gradient)


@pytest.mark.parametrize("name", ["fitnet", "review", "cc", "rkd", "sp", "pkt", "manifold", "uskd", "srrl"])
def test_groups_compute_what_gpus_of_that_size_would(name):
    # Four GPUs of two examples each, with unconnected losses and batch norms: the mean of their losses.
    batch, state = (STUDENT, TEACHER, INDEX % 5), state_of(name)

    def apply(group):
        hint = build(name, group=group)
        extra = {"key": jax.random.key(3), "epoch": 2}
        return jax.jit(lambda s, t, labels: hint.apply(*state, s, t, labels=labels, **extra)[0])

    loss, alone = apply(2)(*batch), apply(None)
    gpus = [jax.tree.map(lambda x, k=k: x[2 * k : 2 * k + 2], batch) for k in range(4)]
    close(loss, sum(alone(*gpu) for gpu in gpus) / 4)
    assert abs(float(loss) - float(on_one_device(name)[0][0])) > 1e-4 * float(loss)


def test_a_sharded_batch_gives_the_same_losses():
    @functools.partial(jax.jit, static_argnums=0)
    def values(cases, states, student, teacher, index):
        extra = {"labels": index % 5, "index": index, "key": jax.random.key(3), "epoch": 2}
        hints = {case: build(case[0], **({"group": case[1]} if case[1] else {})) for case in cases}
        return {f"{c}": hint.apply(*states[c[0]], student, teacher, **extra)[0] for c, hint in hints.items()}

    whole, grouped = (tuple((name, group) for name in names) for names, group in ((OPTIONS, None), (GROUPED, 2)))
    states = {name: state_of(name) for name in OPTIONS}
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.device_put((STUDENT, TEACHER, INDEX), jax.NamedSharding(mesh, jax.P("data")))
    sharded = values(whole + grouped, states, *rows)
    expected = {str((name, None)): on_one_device(name)[0][0] for name in OPTIONS}
    expected |= values(grouped, states, STUDENT, TEACHER, INDEX)
    for case, value in expected.items():
        np.testing.assert_allclose(sharded[case], value, rtol=2e-4, err_msg=case)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide into groups of 3"):
        scope.by_group(relations.rkd, 3, STUDENT["pooled"], TEACHER["pooled"])


def test_review_grows_over_its_warmup():
    hint = build("review", warmup_epochs=4)
    apply = jax.jit(lambda epoch: hint.apply(*state_of("review"), STUDENT, TEACHER, epoch=epoch)[0])
    full = on_one_device("review")[0][0]
    close([apply(e) for e in (0, 1, 4, 9)], [0 * full, full / 4, full, full])


def test_review_taps_the_maps_before_the_last_relu_where_there_are_some():
    levels = taps.levels(STUDENT)
    assert levels[1] is STUDENT["stage2_preact"] and levels[-1].shape == (B, 1, 1, 6)
    assert taps.levels(TEACHER)[1] is TEACHER["stage2"]


def test_tokens_become_a_pyramid():
    tokens = {f"block{k:02d}": jnp.full((2, 17, 32), float(k)) for k in range(1, 9)} | {"pooled": jnp.zeros((2, 32))}
    levels = taps.levels(tokens)
    assert [x.shape[1:] for x in levels] == [(16, 16, 2), (8, 8, 8), (4, 4, 32), (2, 2, 32), (1, 1, 32)]
    assert [float(x.max()) for x in levels] == [2, 4, 6, 8, 0]
    named = taps.levels(tokens, ("block03",))
    assert named[0].shape == (2, 4, 4, 32) and len(named) == 2


@pytest.mark.parametrize("found", [{"pooled": STUDENT["pooled"]}, {"block01": jnp.zeros((2, 5, 4))}])
def test_a_network_without_a_pyramid_is_named(found):
    with pytest.raises(ValueError, match="no feature pyramid"):
        taps.pyramid(found)


def test_a_missing_endpoint_is_named():
    with pytest.raises(ValueError, match="no endpoint 'stage9'; it has stage1, stage2, block01"):
        taps.tap(TEACHER, "stage9")


def test_crd_says_what_it_needs():
    with pytest.raises(ValueError, match="batch\\['index'\\]"):
        build("crd").apply(*state_of("crd"), STUDENT, TEACHER)
    with pytest.raises(ValueError, match="classes of shape"):
        build("crd", classes=np.arange(3))


def test_crd_without_classes_spares_only_the_example_itself():
    apart = build("crd", classes=np.arange(N)).apply
    found, expected = (
        jax.jit(lambda key, apply=apply: apply(*state_of("crd"), STUDENT, TEACHER, index=INDEX, key=key)[0])
        for apply in (build("crd", classes=None).apply, apart)
    )
    close(found(jax.random.key(0)), expected(jax.random.key(0)))
