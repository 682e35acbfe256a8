"""What every loss of the tables promises: finite values and gradients of any input, and the batch that it says it sees.

Each loss is compiled once: its cases are stacked and mapped over.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import scope
from research.distill import losses

B, C, DEVICES, EXAMPLES = 4, 5, 4, 16
HUGE = 1e4
RNG = np.random.default_rng(0)
LABELS = jnp.asarray([0, 3, 1, 4], jnp.int32)

# One hyper-parameter of each loss and two of its values.
VARIED = {
    "kd": ("temperature", (1.0, 4.0)),
    "kd_and_labels": ("temperature", (1.0, 4.0)),
    "dkd": ("beta", (0.5, 8.0)),
    "nkd": ("gamma", (1.0, 1.5)),
    "wsld": ("alpha", (2.25, 2.5)),
    "lskd": ("temperature", (1.0, 2.0)),
    "lskd_dkd": ("temperature", (1.0, 2.0)),
    "lskd_and_labels": ("temperature", (1.0, 2.0)),
    "dist": ("beta", (1.0, 2.0)),
    "multilevel": ("class_weight", (0.5, 1.0)),
    "ofa": ("eps", (1.0, 1.2)),
    "funmatch": ("temperature", (1.0, 2.0)),
    "symmetric_kl": ("lam", (0.1, 0.9)),
    "js": ("lam", (0.1, 0.9)),
    "jsd": ("beta", (0.1, 0.9)),
    "skewed_kl": ("lam", (0.1, 0.9)),
    "skewed_reverse_kl": ("lam", (0.1, 0.9)),
}
# Those without a number to vary.
FIXED = {"hard", "bkd", "meal", "forward_kl", "reverse_kl", "total_variation"}


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _cases(classes):
    """{case: (student, teacher) logits (B, classes)}."""
    student, teacher = _draw(B, classes, seed=1), _draw(B, classes, seed=2)
    right = HUGE * np.eye(classes, dtype=np.float32)[np.asarray(LABELS) % classes]
    wrong = np.roll(right, 1, axis=1)
    zeros = np.zeros_like(student)
    return {
        "any": (student, teacher),
        "identical": (teacher, teacher),
        "zeros": (zeros, zeros),
        "zero student": (zeros, teacher),
        "one-hot teacher": (student, right),
        "sure and right": (right, teacher),
        "sure and wrong": (wrong, right),
        "negative": (-right, right),
        "twice the same example": (student[:1].repeat(B, 0), teacher[:1].repeat(B, 0)),
    }


def _stacked(classes, dtype=jnp.float32):
    student, teacher = (np.stack(side) for side in zip(*_cases(classes).values(), strict=True))
    return jnp.asarray(student, dtype), jnp.asarray(teacher, dtype)


def _finite(tree):
    return all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(tree))


@functools.cache
def results(name):
    """Values and gradients of all cases of a loss, from one compiled function."""
    function = losses.LOSSES[name]

    def mean(student, teacher, **options):
        return jnp.mean(function(student, teacher, LABELS[: len(student)] % student.shape[1], **options))

    mapped = jax.vmap(jax.value_and_grad(mean))

    @jax.jit
    def compute(wide, low, two, tuned):
        found = {"float32": mapped(*wide), "bfloat16": mapped(*low), "two classes": mapped(*two)}
        found["cast"] = jax.vmap(mean)(*(x.astype(jnp.float32) for x in low))
        found["teacher"] = jax.grad(mean, argnums=1)(wide[0][0], wide[1][0])
        first = [x[0] for x in wide]
        if name not in losses.RELATIONAL:
            found["one example"] = jax.value_and_grad(mean)(*(x[:1] for x in first))
        if name in VARIED:
            option, values = VARIED[name]
            found["apart"] = jnp.stack([mean(*first, **{option: value}) for value in values])
            found["mapped"] = jax.vmap(lambda value: mean(*first, **{option: value}))(tuned)
        return found

    tuned = jnp.asarray(VARIED[name][1] if name in VARIED else ())
    return compute(_stacked(C), _stacked(C, jnp.bfloat16), _stacked(2), tuned)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_values_and_gradients_are_finite(name):
    found = results(name)
    for kind in ("float32", "bfloat16", "two classes"):
        for index, case in enumerate(_cases(C)):
            assert _finite(jax.tree.map(lambda x, k=index: x[k], found[kind])), (kind, case)
    value, gradient = found["bfloat16"]
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, found["cast"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_batch_of_one_is_finite_or_refused(name):
    if name not in losses.RELATIONAL:
        assert _finite(results(name)["one example"])
        return
    try:
        assert _finite(losses.LOSSES[name](*(jnp.asarray(x[:1]) for x in _cases(C)["any"]), LABELS[:1]))
    except ValueError as error:
        assert "two or more" in str(error)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_teacher_is_a_constant(name):
    assert not np.any(results(name)["teacher"])


@pytest.mark.parametrize("name", losses.LOSSES)
def test_hyper_parameters_may_be_mapped_over(name):
    assert (name in VARIED) != (name in FIXED), f"say which number of {name} varies"
    if name in VARIED:
        np.testing.assert_allclose(results(name)["mapped"], results(name)["apart"], rtol=1e-5)
        assert results(name)["apart"][0] != results(name)["apart"][1]


def test_a_sharded_batch_gives_the_same_losses_and_gradients():
    student, teacher = (jnp.asarray(_draw(8, C, seed=k)) for k in (1, 2))
    labels = jnp.asarray(RNG.integers(0, C, 8), jnp.int32)

    def total(s, t):
        values = {name: jnp.mean(f(s, t, labels)) for name, f in losses.LOSSES.items()}
        for name in losses.RELATIONAL:
            values[f"{name} by 2"] = scope.by_group(losses.LOSSES[name], 2, s, t)
        return sum(values.values()), values

    compute = jax.jit(jax.value_and_grad(total, has_aux=True))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    (_, sharded), sharded_gradient = compute(*jax.device_put((student, teacher), rows))
    (_, expected), gradient = compute(student, teacher)
    for name, value in expected.items():
        np.testing.assert_allclose(sharded[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(sharded_gradient, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(losses.RELATIONAL))
@pytest.mark.parametrize("group", [None, 2])
def test_relational_losses_see_the_same_batch_on_one_device_and_on_several(name, group):
    student, teacher = (jnp.asarray(_draw(2 * DEVICES, C, seed=k)) for k in (1, 2))
    function = jax.value_and_grad(lambda s, t: scope.by_group(losses.LOSSES[name], group, s, t))
    expected, expected_gradient = jax.jit(function)(student, teacher)

    def share(s, t):
        with scope.batch_axis("data"):
            value, gradient = function(s, t)
            return scope.mean(value), gradient / DEVICES

    split = (x.reshape(DEVICES, -1, C) for x in (student, teacher))
    value, gradient = jax.pmap(share, "data", devices=jax.devices()[:DEVICES])(*split)
    np.testing.assert_allclose(value, jnp.full(DEVICES, expected), rtol=2e-4)
    np.testing.assert_allclose(gradient.reshape(-1, C), expected_gradient, rtol=2e-4, atol=1e-6)
    if group:
        apart = [losses.LOSSES[name](student[k : k + 2], teacher[k : k + 2]) for k in range(0, 2 * DEVICES, 2)]
        np.testing.assert_allclose(expected, np.mean(apart), rtol=2e-4)


def _endpoints(seed, rows=B, classes=C):
    """Endpoints that serve every hint; equal seeds are equal networks."""
    rng = np.random.default_rng(seed)
    shapes = {f"stage{k + 1}": (rows, side, side, 4) for k, side in enumerate((4, 2))}
    shapes |= {f"block{k:02d}": (rows, 4, 4) for k in range(1, 4)} | {"pooled": (rows, 4), "logits": (rows, classes)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


HINT_OPTIONS = {
    "cc": {"dim": 4},
    "crd": {"num_examples": EXAMPLES, "classes": np.arange(EXAMPLES) % 3, "dim": 4, "negatives": 3},
    "review": {"max_mid": 4, "warmup_epochs": 0},
    "ofa": {"stages": (2,)},
    "gpt4image": {"teacher": "pooled"},
    "ft": {"init_epochs": 1},
    "uskd": {"student": "stage2"},
    "discriminator": {"reduction": 1},
}
# One hyper-parameter of each hint method: its default and another value.
HINT_VARIED = {
    "ab": ("margin", (1.0, 2.0)),
    "vid": ("eps", (1e-5, 1.0)),
    "srrl": ("feature_weight", (1.0, 2.0)),
    "mgd": ("alpha", (7e-5, 1e-3)),
    "vitkd": ("alpha", (3e-5, 1e-3)),
    "pkt": ("eps", (1e-7, 1e-2)),
    "manifold": ("patch_weight", (4.0, 1.0)),
    "cc": ("scale", (0.02, 0.2)),
    "rkd": ("angle_weight", (50.0, 5.0)),
    "crd": ("temperature", (0.07, 0.2)),
    "ofa": ("eps", (1.0, 1.2)),
    "gpt4image": ("tau", (0.2, 0.4)),
    "ctkd": ("span", (20.0, 10.0)),
    "uskd": ("alpha", (1.0, 2.0)),
}
# Those without a number to vary, or with one that makes shapes.
HINT_FIXED = {"fitnet", "at", "at_paper", "nst", "fsp", "kdsvd", "ofd", "ft", "sp", "review", "discriminator"}
# Those that see the logits.
OF_LOGITS = {"srrl", "ofa", "ctkd", "uskd", "discriminator"}


def _hint(name, classes=C, **more):
    head = {"kernel": _draw(4, classes), "bias": np.zeros(classes, np.float32)} if name == "srrl" else {}
    return losses.HINTS[name](**HINT_OPTIONS.get(name, {}), **head, **more)


def _extra(rows, classes, key):
    index = jnp.arange(rows, dtype=jnp.int32)
    return {"labels": LABELS[:rows] % classes, "index": index, "key": key, "epoch": jnp.ones((), jnp.int32) * 2}


def _hint_cases():
    """{case: (student, teacher) endpoints}."""
    student, teacher = _endpoints(1), _endpoints(2)
    zeros = jax.tree.map(np.zeros_like, student)
    huge = jax.tree.map(lambda x: HUGE * np.sign(x), student)
    right = HUGE * np.eye(C, dtype=np.float32)[np.asarray(LABELS)]
    return {
        "any": (student, teacher),
        "identical": (teacher, teacher),
        "zeros": (zeros, zeros),
        "zero student": (zeros, teacher),
        "one-hot teacher": (student, teacher | {"logits": right}),
        "sure and wrong": (student | {"logits": np.roll(right, 1, axis=1)}, teacher | {"logits": right}),
        "huge": (huge, jax.tree.map(np.negative, huge)),
    }


@functools.cache
def hint_results(name):
    """Values and gradients of all cases of a hint, in bfloat16, and its values of a mapped hyper-parameter."""
    hint = _hint(name)
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x), jnp.bfloat16), *_hint_cases().values())

    @jax.jit
    def compute(key, stacked, tuned):
        first = jax.tree.map(lambda x: x[0], stacked)
        params, state = hint.init(key, *first)
        extra = _extra(B, C, key)

        def case(student, teacher):
            value = lambda params, student: hint.apply(params, state, student, teacher, **extra)
            return jax.value_and_grad(value, (0, 1), has_aux=True)(params, student)

        found = {"cases": jax.vmap(case)(*stacked)}
        if name in HINT_VARIED:
            option, values = HINT_VARIED[name]
            of = lambda value: _hint(name, **{option: value}).apply(params, state, *first, **extra)[0]
            found |= {"mapped": jax.vmap(of)(tuned), "apart": of(values[1])}
        return found

    return compute(jax.random.key(0), stacked, jnp.asarray(HINT_VARIED[name][1] if name in HINT_VARIED else ()))


@pytest.mark.parametrize("name", losses.HINTS)
def test_hints_are_finite_at_degenerate_endpoints(name):
    found = hint_results(name)["cases"]
    for index, case in enumerate(_hint_cases()):
        assert _finite(jax.tree.map(lambda x, k=index: x[k], found)), case
    assert found[0][0].dtype == jnp.float32


@pytest.mark.parametrize("name", losses.HINTS)
def test_hyper_parameters_of_hints_may_be_mapped_over(name):
    assert (name in HINT_VARIED) != (name in HINT_FIXED), f"say which number of {name} varies"
    if name in HINT_VARIED:
        found = hint_results(name)
        expected = jnp.stack([found["cases"][0][0][0], found["apart"]])
        np.testing.assert_allclose(found["mapped"], expected, rtol=1e-4)
        assert expected[0] != expected[1]


@pytest.mark.parametrize("name", losses.HINTS)
def test_hints_take_one_example_of_two_classes_or_refuse_it(name):
    hint = _hint(name, classes=2)
    student, teacher = jax.tree.map(jnp.asarray, (_endpoints(1, 1, 2), _endpoints(2, 1, 2)))

    @jax.jit
    def compute(key):
        params, state = hint.init(key, student, teacher)
        value = lambda params, student: hint.apply(params, state, student, teacher, **_extra(1, 2, key))
        return jax.value_and_grad(value, (0, 1), has_aux=True)(params, student)

    try:
        assert _finite(compute(jax.random.key(0)))
    except ValueError as error:
        assert "two or more" in str(error) and name not in OF_LOGITS
