"""The teachers of a run: one network or several that see the same images, frozen and in evaluation mode.

`config.teacher` is the first, whose endpoints hints see; `config.teacher.ensemble` names further ones. Losses of
several teachers get their logits as (K, B, C), all others those of the mean of their probabilities.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from research.backbones import classify
from research.core import sharding
from research.layers.norm import accumulation_dtype
from research.port import checkpoint

TEACHER = "teacher"
RANDOM = "random"  # as teacher.weights: an untrained teacher, to try the plumbing

Networks = dict[str, classify.Network]


def sections(config) -> dict[str, Mapping]:
    """The teachers of a config by name, the main one as `teacher`, others as `teacher_<name>`.

    Empty without, and where stored labels take their place.
    """
    t = config.teacher
    if not t.model or t.get("labels"):
        return {}
    return {TEACHER: t, **{f"{TEACHER}_{name}": more for name, more in t.get("ensemble", {}).items()}}


def networks(config) -> Networks:
    """The networks of `sections`."""
    size, classes = config.augment.size, config.data.num_classes
    return {
        name: classify.network(t.model, classes, size, dtype=t.dtype, **t.options)
        for name, t in sections(config).items()
    }


def frozen(found: Networks, key: jax.Array) -> dict:
    """Random variables {name: {"params", "model_state"}}, parameters in each network's own dtype."""
    made = {}
    for number, (name, network) in enumerate(found.items()):
        params, model_state = network.init(jax.random.fold_in(key, number) if number else key)
        params = jax.tree.map(lambda x, dtype=network.module.dtype: x.astype(dtype), params)
        made[name] = {"params": params, "model_state": model_state}
    return made


def weights(config, found: Networks) -> dict:
    """The pretrained variables of `frozen`'s form, without those of random teachers. It reads files."""
    made = {}
    for name, t in sections(config).items():
        if t.weights != RANDOM:
            params, model_state = pretrained(t, found[name], config.data.num_classes)
            made[name] = {"params": params, "model_state": model_state}
    return made


def apply(found: Networks, variables: Mapping, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(logits (K, B, C), the first teacher's endpoints and all teachers' mean `logits`), constants.

    Images are in [0, 1]. It is the mean of raw logits that MEAL V2's discriminator sees.
    """
    logits, seen = [], {}
    for name, network in found.items():
        own, endpoints, _ = network.apply(variables[name]["params"], variables[name]["model_state"], images)
        logits.append(own)
        seen = seen or endpoints
    stacked = jnp.stack(logits)
    return jax.lax.stop_gradient((stacked, {**seen, "logits": jnp.mean(stacked, axis=0)}))


def combined(logits: jax.Array) -> jax.Array:
    """Logits (B, C) of the mean of the probabilities of (K, B, C); a single teacher's own."""
    if len(logits) == 1:
        return logits[0]
    logits = logits.astype(accumulation_dtype(logits))
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(jnp.asarray(len(logits), logits.dtype))


def pretrained(section: Mapping, network: classify.Network, num_classes: int, *, new: bool = False) -> tuple:
    """(params, model_state) from the checkpoint that a teacher's or student's section names.

    Args:
      new: it may be of the network without its `reduce`; what that adds is then not among the parameters.
    Raises:
      ValueError: the checkpoint is of another network.
    """
    if checkpoint.is_own(section.weights):
        variables = checkpoint.load_variables(section.weights)
    else:
        variables = checkpoint.load_official(
            section.model, section.weights, num_classes=num_classes, image_size=network.size
        )
    modules = [network.module]
    if new and getattr(network.module, "reduce", None) is not None:
        modules.append(network.module.clone(reduce=None))
    names = lambda tree: {path for path, _ in sharding.paths(dict(tree))}
    make = lambda module: jax.eval_shape(lambda key: module.init(key, network.example()), jax.random.PRNGKey(0))
    found, wanted = names(variables), [names(make(module)) for module in modules]
    if found not in wanted:
        wrong = sorted(found ^ wanted[0])[0]
        raise ValueError(
            f"{section.weights} holds another network than {section.model}: {wrong} is in one of them only"
        )
    return variables.pop("params"), variables


def classifier(params, num_classes: int) -> dict[str, jax.Array]:
    """{"kernel" (C, num_classes), "bias"} of the classifier: the one linear layer at the top with so many outputs.

    Raises:
      ValueError: there is none, or several.
    """
    found = [
        layer
        for layer in params.values()
        if getattr(layer.get("kernel"), "ndim", 0) == 2 and layer["kernel"].shape[1] == num_classes and "bias" in layer
    ]
    if len(found) != 1:
        raise ValueError(
            f"the teacher has {len(found)} linear classifiers of {num_classes} classes, where one is needed"
        )
    return {"kernel": found[0]["kernel"], "bias": found[0]["bias"]}


def stage_norms(params) -> list[tuple[jax.Array, jax.Array]] | None:
    """(scale, bias) of the last batch norm of every stage of a ResNet, shallow to deep; None for other networks."""
    last: dict[int, tuple] = {}
    for path, _ in sharding.paths(params):
        if found := re.fullmatch(r"layer(\d+)_(\d+)/bn(\d+)/scale", path):
            stage, *place = map(int, found.groups())
            last[stage] = max(last.get(stage, (-1, -1)), tuple(place))
    layers = [params[f"layer{stage}_{block}"][f"bn{norm}"] for stage, (block, norm) in sorted(last.items())]
    return [(layer["scale"], layer["bias"]) for layer in layers] or None
