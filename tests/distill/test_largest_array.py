"""No loss holds (B, B, C) or more: the largest array in the program of its value and gradients, inner loops included.

What is read is the jaxpr, before any fusion, so this is an upper bound of what a compiler may hold.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from research.distill import losses, memory

B, C = 53, 59  # primes, so that a shape tells what its axes are
STUDENT, TEACHER, TWIN = (17, 19), (23, 29), 13
EXAMPLES = 128
TWINS = {"student": ("twin1", "twin2"), "teacher": ("twin1", "twin2")}
OPTIONS = {
    "cc": {"dim": 13},
    "crd": {"num_examples": EXAMPLES, "classes": np.arange(EXAMPLES) % 3, "dim": 13, "negatives": 4 * B},
    "review": {"max_mid": 17},
    "ofa": {"stages": (1, 2)},
    "gpt4image": {"teacher": "pooled"},
    "fsp": TWINS,
    "kdsvd": TWINS,
    "srrl": {"kernel": np.zeros((TEACHER[1], C), np.float32), "bias": np.zeros(C, np.float32)},
    "ft": {"init_epochs": 1},
    "manifold": {"sample": 41},
    "uskd": {"student": "stage2"},
    "discriminator": {"reduction": 2},
}


def _arrays(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (tuple(variable.aval.shape) for variable in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if isinstance(inner, jex.ClosedJaxpr | jex.Jaxpr):
                    yield from _arrays(getattr(inner, "jaxpr", inner))


def largest(function, *arguments):
    """The shape of the largest array that `function(*arguments)` computes, at any depth of its program."""
    return max(_arrays(jax.make_jaxpr(function)(*arguments).jaxpr), key=math.prod, default=())


def _struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _endpoints(widths):
    shapes = {f"stage{k}": (B, side, side, width) for k, side, width in zip((1, 2), (4, 2), widths, strict=True)}
    shapes |= {f"block{k:02d}": (B, 5, widths[1]) for k in range(1, 5)}
    shapes |= {"twin1": (B, 4, 4, TWIN), "twin2": (B, 2, 2, TWIN), "pooled": (B, widths[1]), "logits": (B, C)}
    return {name: _struct(*shape) for name, shape in shapes.items()}


def _differences(x):
    return jnp.sum(jnp.square(x[:, None] - x[None, :]))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: lambda x: jax.lax.scan(lambda total, _: (total + f(x), None), 0.0, None, length=3)[0],
        lambda f: lambda x: jax.lax.while_loop(lambda total: total < 1, lambda total: total + f(x), 0.0),
        lambda f: lambda x: jax.lax.cond(True, f, jnp.sum, x),
    ],
)
def test_a_cube_is_found_wherever_it_hides(wrap):
    function = wrap(_differences)
    assert largest(function, _struct(B, C)) == (B, B, C)
    assert largest(jnp.sum, _struct(B, C)) == ()


def test_a_cube_is_found_in_a_gradient():
    @jax.custom_vjp
    def small(x):
        return jnp.sum(x)

    small.defvjp(lambda x: (jnp.sum(x), x), lambda x, g: (g * jax.grad(_differences)(x),))
    assert largest(small, _struct(B, C)) == () and largest(jax.grad(small), _struct(B, C)) == (B, B, C)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_hold_no_more_than_a_matrix(name):
    def loss(student, teacher, labels):
        return jnp.mean(losses.LOSSES[name](student, teacher, labels))

    shape = largest(jax.value_and_grad(loss), _struct(B, C), _struct(B, C), jax.ShapeDtypeStruct((B,), jnp.int32))
    assert math.prod(shape) <= max(B, C) ** 2, shape


@pytest.mark.parametrize("name", losses.HINTS)
def test_hints_hold_no_examples_against_examples_by_width(name, monkeypatch):
    # As many candidates at a time as a batch of this size and thousands of negatives would have.
    monkeypatch.setattr(memory, "_CANDIDATES", 4)
    hint = losses.HINTS[name](**OPTIONS.get(name, {}))
    student, teacher = _endpoints(STUDENT), _endpoints(TEACHER)
    index = jax.ShapeDtypeStruct((B,), jnp.int32)

    def loss(params, student, state, teacher, index, key):
        extra = {"labels": index % C, "index": index, "key": key, "epoch": jnp.ones((), jnp.int32) * 2}
        return hint.apply(params, state, student, teacher, **extra)

    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(hint.init, key, student, teacher)
    gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
    shape = largest(gradient, params, student, state, teacher, index, key)
    assert math.prod(shape) < B * B * min(STUDENT), shape
