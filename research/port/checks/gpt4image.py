"""Golden checks of GPT4Image: text losses with gradients, heads, and whole networks with theirs."""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from research.backbones import resnet, vit
from research.distill.gpt4image import NAMES, TEXT_LOSSES, TextHead
from research.port.checks.common import nhwc
from research.port.names import from_official
from research.port.verify import Golden


def check_losses(golden: Golden) -> dict:
    """`clip_wsN` states the loss of each of N ranks, and their gradients for their own rows, before any averaging."""
    image, text, found = jnp.asarray(golden.x["img_emb"]), jnp.asarray(golden.x["text_emb"]), {}
    for key, expected in golden.y.items():
        if key.startswith("grad_"):
            continue
        name = re.sub(r"_ws\d+$", "", key)
        options = {} if name == "byol" else {"tau": golden.kwargs["tau"]}
        mean = lambda z, name=name, options=options: jnp.mean(TEXT_LOSSES[name](z, text, **options))
        value, found[f"grad_{key}"] = jax.jit(jax.value_and_grad(mean))(image)
        found[key] = jnp.broadcast_to(value, expected.shape)
    return found


def _filled(module, weights: dict, rules, *arguments) -> dict:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))
    return jax.tree.map(jnp.asarray, from_official(shapes, weights, rules))


def _head(weights: dict, kind: str = "mlp") -> tuple[TextHead, list]:
    """The head that the official weights are of, and the rules of its names."""
    norm = "proj_layer.1.running_mean" in weights
    last = weights["proj_layer.weight" if kind == "linear" else f"proj_layer.{3 if norm else 2}.weight"]
    hidden = None if kind == "linear" else last.shape[1]
    return TextHead(last.shape[0], kind, hidden, norm, dtype=jnp.float64), NAMES[norm]


def _split(weights: dict) -> tuple[dict, dict]:
    """(the network's weights, the head's), without the wrapper's prefix."""
    head = {name: value for name, value in weights.items() if name.startswith("proj_layer.")}
    return {name.removeprefix("model."): value for name, value in weights.items() if name not in head}, head


def check_resnet_proj(golden: Golden) -> dict:
    head, rules = _head(golden.w)
    feature = jnp.asarray(golden.x["feat"])
    variables = _filled(head, golden.w, rules, feature)
    trained, new = jax.jit(lambda x: head.apply(variables, x, mutable=["batch_stats"]))(feature)
    stats = new["batch_stats"]["bn"]
    return {
        "eval": head.apply(variables, feature, train=False),
        "train": trained,
        **{f"running_{name}_after": stats[name] for name in ("mean", "var")},
    }


def _network(family, model, weights: dict, image, kind: str) -> dict:
    own, projection = _split(weights)
    variables = _filled(model, own, next(iter(family.NAMES.values())), image)
    logits, endpoints = jax.jit(model.apply)(variables, image)
    head, rules = _head(projection, kind)
    pooled = endpoints["pooled"]
    projected = head.apply(_filled(head, projection, rules, pooled), pooled, train=False)
    return {"logits": logits, "proj": projected}


def check_deit(golden: Golden) -> dict:
    sizes = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "num_classes")
    model = vit.build(dtype=jnp.float64, **{name: golden.kwargs[name] for name in sizes if name in golden.kwargs})
    return _network(vit, model, golden.w, nhwc(golden.x["image"]), golden.kwargs.get("proj_type", "mlp"))


def _drawn(golden: Golden, key: str, shape) -> np.ndarray:
    """The standard normal draw that `meta.weights_recipe` states for a key of the state dict."""
    seed = (golden.meta["seed"] << 32) + zlib.crc32(key.encode())
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)


def _weight(golden: Golden, key: str, shape) -> np.ndarray:
    a = _drawn(golden, key, shape)
    if key.endswith("running_var"):
        a = 0.5 + 0.5 * np.abs(a)
    elif len(shape) >= 2:
        a = a / np.float32(np.sqrt(np.prod(shape[1:])))
    else:
        scaled = key.endswith(".weight")
        a = scaled + np.float32(0.1) * a
    return a.astype(np.float64)


def check_resnet_full(golden: Golden) -> dict:
    """A full-size network whose weights and image are drawn again from the file's recipe."""
    shapes = golden.meta["state_dict_shapes"]
    weights = {key: _weight(golden, key, shape) for key, shape in shapes.items() if not key.endswith("_tracked")}
    size = int(golden.x["image_size"])
    image = jnp.asarray(_drawn(golden, "image", (2, 3, size, size)).astype(np.float64))
    arguments = {**resnet.VARIANTS[golden.kwargs["arch"]], "num_classes": shapes["model.fc.weight"][0]}
    kind = "linear" if "proj_layer.weight" in shapes else "mlp"
    return _network(resnet, resnet.build(dtype=jnp.float64, **arguments), weights, nhwc(image), kind)


CHECKS = {
    "losses": check_losses,
    "resnet_proj": check_resnet_proj,
    "deit": check_deit,
    "resnet_full": check_resnet_full,
}
