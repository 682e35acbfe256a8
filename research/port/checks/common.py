"""What the golden checks of networks share: official weights in, official outputs back."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from research.port.names import from_official, official
from research.port.verify import Golden


def nhwc(array) -> jax.Array:
    """(B, C, H, W) -> (B, H, W, C)."""
    return jnp.moveaxis(jnp.asarray(array), 1, -1)


def nchw(array) -> jax.Array:
    """(B, H, W, C) -> (B, C, H, W); arrays of another rank pass."""
    return jnp.moveaxis(array, -1, 1) if array.ndim == 4 else array


def variables(golden: Golden, family, model: nn.Module, dialect: str | None = None) -> dict:
    """The golden's weights as variables of `model`, a module of the backbone module `family`."""
    image = jax.ShapeDtypeStruct(nhwc(golden.x["image"]).shape, model.dtype)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    rules = family.NAMES[dialect or next(iter(family.NAMES))]
    return from_official(shapes, golden.w, rules, ignore=getattr(family, "IGNORED", ()))


def run(
    golden: Golden,
    family,
    model: nn.Module,
    endpoint: Callable[[str], str],
    *,
    dialect: str | None = None,
    layout: Callable = nchw,
    **options,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict]:
    """Applies `model` with the golden's weights to `x/image`.

    Args:
      family: the backbone module with the rules of names.
      endpoint: official module name -> name of our endpoint, for the `feat.<module>` the golden expects. A name that is
        no endpoint is looked up among the outputs of all modules, by official name.
      dialect: key of `family.NAMES`; the first by default.
      layout: turns an endpoint into the official axis order.
      **options: of the call, such as `train=True`.
    Returns:
      ({"logits", "feat.<module>"... as the golden names them}, all endpoints, the updated collections).
    """
    weights = variables(golden, family, model, dialect)
    options |= {"capture_intermediates": True, "mutable": ["batch_stats", "intermediates"]}
    apply = functools.partial(model.apply, **options)
    (logits, endpoints), updates = jax.jit(apply)(weights, nhwc(golden.x["image"]))
    rules = family.NAMES[dialect or next(iter(family.NAMES))]
    inner = {}
    for path, outputs in traverse_util.flatten_dict(updates.pop("intermediates")).items():
        name, _ = official(("intermediates", *path), rules)
        inner[name.removesuffix(".__call__")] = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    taps = {}
    for key in golden.y:
        if key.startswith("feat."):
            name = endpoint(key.removeprefix("feat."))
            taps[key] = layout(endpoints[name] if name in endpoints else _output(inner, name))
    return {"logits": logits, **taps}, endpoints, updates


def _output(inner: dict[str, jax.Array], name: str) -> jax.Array:
    """Output of the official module `name`; that of a sequence is its last numbered part's."""
    parts = [int(part) for module in inner if (part := module.removeprefix(f"{name}.")).isdigit()]
    return inner[f"{name}.{max(parts)}" if name not in inner and parts else name]


def with_gradient(
    golden: Golden, family, model: nn.Module, dialect: str | None = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Evaluates `model` on `x/image` and differentiates.

    Returns:
      ({"logits", "grad_image_of_logit_sum": gradient of the sum of all logits, in NCHW}, all endpoints).
    """
    weights = variables(golden, family, model, dialect)

    def total(image):
        logits, endpoints = model.apply(weights, nhwc(image))
        return jnp.sum(logits), (logits, endpoints)

    gradient, (logits, endpoints) = jax.jit(jax.grad(total, has_aux=True))(np.asarray(golden.x["image"]))
    return {"logits": logits, "grad_image_of_logit_sum": gradient}, endpoints
