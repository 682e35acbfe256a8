"""Optimisers as the published recipes define them, put together from optax's parts.

Every optimiser is an `optax.GradientTransformation` of the same pattern: clip, precondition, decay, scale by layer,
scale by the learning rate. The learning rate is a function of the step, so the state holds arrays only, and nothing in
it depends on how parameters are sharded.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax


def optimizer(
    name: str,
    lr: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    no_decay: Sequence[str] = (),
    decay_anyway: Sequence[str] = (),
    clip: float = 0.0,
    lr_scale: Callable[[str], float] | Mapping | None = None,
    groups: Sequence[tuple[str, float, int]] = (),
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float | None = None,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """The optimiser `name`.

    "sgd" is PyTorch's SGD with momentum and "nesterov" its Nesterov form, which is what timm calls `sgd`. "adamw" is
    PyTorch's. "lamb" (arXiv 1904.00962) is timm's: beside `clip` it clips to `max_grad_norm`, and it adapts the rate
    layer by layer (the trust ratio) only where weight decay applies; optax.lamb does neither.

    Args:
      name: of the four above.
      lr: learning rate, or step -> learning rate.
      weight_decay: added to the gradient by SGD; decoupled, times the learning rate, in the others.
      no_decay, decay_anyway: regular expressions on parameter paths that correct the rule of `decayed`.
      clip: largest global norm of the gradients; 0 leaves them.
      lr_scale: parameter path -> factor on its learning rate, such as `layer_decay` gives; or, as in a config, the
        arguments of `layer_decay` by name.
      groups: (regular expression, factor on the learning rate, first step that moves them) of groups of parameters; the
        first expression that finds a path counts. A group that rests, or has the factor 0, changes in no way, but the
        optimiser's own statistics see its gradients. Parameters of no group are not concerned.
      momentum: of SGD.
      b1, b2, eps: decay rates and denominator's offset of AdamW (eps 1e-8) and LAMB (1e-6).
      max_grad_norm: of LAMB; 0 switches it off.
    Raises:
      ValueError: unknown name.
    """
    mask = lambda params: decayed(params, no_decay, decay_anyway)
    decay = optax.add_decayed_weights(weight_decay, mask)
    adam = lambda default: optax.scale_by_adam(b1, b2, default if eps is None else eps)
    # The rate is adapted where decay applies, so without any decay it is not adapted at all.
    trust = optax.masked(optax.scale_by_trust_ratio(), mask) if weight_decay else optax.identity()
    rules = {
        "sgd": lambda: (decay, optax.trace(momentum)),
        "nesterov": lambda: (decay, optax.trace(momentum, nesterov=True)),
        "adamw": lambda: (adam(1e-8), decay),
        "lamb": lambda: (_clip(max_grad_norm), adam(1e-6), decay, trust),
    }
    if name not in rules:
        raise ValueError(f"unknown optimizer {name!r}: choose one of {', '.join(rules)}")
    factor = lr_scale if callable(lr_scale) or not lr_scale else layer_decay(**lr_scale)
    scale = _scale_by_path(factor) if factor else optax.identity()
    scale = optax.chain(scale, _scale_by_group(groups)) if groups else scale
    return _any_promotion(optax.chain(_clip(clip), *rules[name](), scale, optax.scale_by_learning_rate(lr)))


def by_name(optimizers: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """Each entry of the parameters {name: tree} under its own optimiser, clipping and norms included."""

    def init(params):
        return {name: optimizer.init(params[name]) for name, optimizer in optimizers.items()}

    def update(updates, state, params=None):
        new = {
            name: optimizer.update(updates[name], state[name], None if params is None else params[name])
            for name, optimizer in optimizers.items()
        }
        return {name: found[0] for name, found in new.items()}, {name: found[1] for name, found in new.items()}

    return optax.GradientTransformation(init, update)


def decayed(params, no_decay: Sequence[str] = (), decay_anyway: Sequence[str] = ()):
    """Which parameters weight decay applies to, as a pytree of bools (timm's rule).

    Vectors and scalars, and anything named `bias`, are spared; so are paths that a regular expression of `no_decay`
    finds (timm's `no_weight_decay()`: position embeddings, class tokens). `decay_anyway` has the last word, for
    parameters that are vectors here and were tensors in the official model.
    """

    def rule(path, leaf):
        name = path_name(path)
        spared = leaf.ndim <= 1 or name.split("/")[-1] == "bias" or _found(no_decay, name)
        return not spared or _found(decay_anyway, name)

    return jax.tree_util.tree_map_with_path(rule, params)


def layer_decay(decay: float, rules: Sequence[tuple[str, int]], layers: int) -> Callable[[str], float]:
    """Layer-wise learning-rate decay: parameter path -> decay ** (layers - layer), as in BEiT's fine-tuning.

    Args:
      decay: factor from one layer to the one below.
      rules: (regular expression, first layer); the first that matches gives the layer, plus the number captured by its
        group where it has one: `(r"^block(\\d+)/", 1)`. Parameters without a match are in the top layer.
      layers: index of the top layer, whose factor is 1.
    """

    def scale(path: str) -> float:
        for pattern, first in rules:
            if match := re.search(pattern, path):
                return decay ** (layers - first - (int(match.group(1)) if match.re.groups else 0))
        return 1.0

    return scale


def ema_update(ema, new, decay: float):
    """The exponential moving average `decay * ema + (1 - decay) * new` of every floating leaf; others are replaced.

    As timm's ModelEmaV2: a constant decay, for parameters and batch statistics alike.
    """

    def update(old, value):
        return old * decay + value * (1 - decay) if jnp.issubdtype(old.dtype, jnp.floating) else value

    return jax.tree.map(update, ema, new)


def path_name(path) -> str:
    """A JAX key path as the text that rules are matched with: `block1/attn/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _clip(norm: float) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(norm) if norm else optax.identity()


def _scale_by_path(factor: Callable[[str], float]) -> optax.GradientTransformation:
    def update(updates, params=None):
        del params
        return jax.tree_util.tree_map_with_path(lambda path, u: u * factor(path_name(path)), updates)

    return optax.stateless(update)


def _scale_by_group(groups: Sequence[tuple[str, float, int]]) -> optax.GradientTransformation:
    def scaled(name, update, count):
        for pattern, factor, first in groups:
            if re.search(pattern, name):
                return update * jnp.where(count >= first, factor, 0.0).astype(update.dtype)
        return update

    def update(updates, state, params=None):
        del params
        found = jax.tree_util.tree_map_with_path(lambda path, u: scaled(path_name(path), u, state.count), updates)
        return found, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def descend(rule: optax.GradientTransformation, gradients, state, params) -> tuple:
    """(params, state) after one update of a rule of optax, which counts steps in integers: strict promotion is lifted.

    Args:
      gradients: of `params`, a pytree of their form; state: of the rule, `rule.init(params)` at first.
    """
    with jax.numpy_dtype_promotion("standard"):
        changes, state = rule.update(gradients, state, params)
        return optax.apply_updates(params, changes), state


def _any_promotion(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` under JAX's usual dtype promotion: optax itself does not pass the strict one."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _found(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
