"""What the golden checks of the distillation losses share."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from research.port.checks.common import nhwc
from research.port.names import from_official, to_official
from research.port.verify import Golden

DTYPE = jnp.float64


def keep(golden: Golden, found: dict) -> dict:
    return {key: value for key, value in found.items() if key in golden.y}


def value_and_gradient(function: Callable[[jax.Array], jax.Array], x) -> tuple[jax.Array, jax.Array]:
    return jax.jit(jax.value_and_grad(function))(jnp.asarray(x))


def name_gradients(gradients: dict, rules, prefix: str) -> dict:
    """Gradients of params under their official names."""
    return {f"{prefix}{name}": value for name, value in to_official({"params": gradients}, rules).items()}


def maps(golden: Golden, side: str) -> list[jax.Array]:
    """The maps `x/<side>_0`, `x/<side>_1`, ... in NHWC."""
    count = sum(re.fullmatch(rf"{side}_\d+", name) is not None for name in golden.x)
    return [nhwc(golden.x[f"{side}_{k}"]) for k in range(count)]


def part(weights: dict, prefix: str) -> dict:
    """The weights below `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): x for name, x in weights.items() if name.startswith(f"{prefix}.")}


def variables(module, official: dict, rules, *arguments, **options) -> dict:
    """The golden's weights as variables of `module`; `arguments` and `options` are those of its call."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, **options))
    return jax.tree.map(jnp.asarray, from_official(shapes, official, rules))
