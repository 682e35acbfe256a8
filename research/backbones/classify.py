"""A backbone together with what its images must look like, as pure functions of parameters and images in [0, 1]."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from research import backbones
from research.core import cost
from research.core import experiment as engine
from research.core import metrics as metrics_lib


class Network(NamedTuple):
    """A backbone with what its images must look like: mean and std per channel, for images in [0, 1]."""

    name: str
    module: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Random (params, model_state)."""
        variables = dict(self.module.init({"params": key}, self.example(), train=False))
        return variables.pop("params"), variables

    def example(self) -> jax.Array:
        """One black image, (1, H, W, 3), of the size the network is used at."""
        return jnp.zeros((1, self.size, self.size, 3), self.module.dtype)

    def cost(self) -> dict[str, int]:
        """Parameters and multiply-adds of one image's forward pass."""
        params, model_state = jax.eval_shape(self.init, jax.random.PRNGKey(0))
        forward = lambda *arguments: self.apply(*arguments)[0]
        macs = cost.macs(forward, params, model_state, jnp.zeros((1, self.size, self.size, 3)))
        return {"params": cost.params_count(params), "macs": macs}

    def apply(self, params, model_state, images, *, train: bool = False, key: jax.Array | None = None):
        """Images in [0, 1], (B, H, W, 3) -> (logits (B, C) float32, endpoints, new model_state)."""
        mean, std = (jnp.asarray(x, images.dtype)[None, None, None, :] for x in (self.mean, self.std))
        images = ((images - mean) / std).astype(self.module.dtype)
        variables = {"params": params, **model_state}
        if not train:
            logits, endpoints = self.module.apply(variables, images, train=False)
            return logits.astype(jnp.float32), endpoints, model_state
        rngs = {"dropout": key} if key is not None else None
        mutable = list(model_state)
        (logits, endpoints), new = self.module.apply(variables, images, train=True, rngs=rngs, mutable=mutable)
        return logits.astype(jnp.float32), endpoints, {**model_state, **new}


def network(
    name: str,
    num_classes: int,
    size: int,
    *,
    dtype: str = "float32",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    **options,
) -> Network:
    """The Network of variant `name`; options go to the module's constructor.

    `mean` and `std` replace the normalisation of the published weights, for weights trained on other images.
    """
    spec = backbones.input_spec(name)
    options = {k: v for k, v in options.items() if v is not None}
    module = backbones.create(name, num_classes=num_classes, dtype=jnp.dtype(dtype), **options)
    return Network(name, module, mean or spec.mean, std or spec.std, size)


def unit(images: jax.Array) -> jax.Array:
    """uint8 images as float32 in [0, 1]; floating images pass."""
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def accuracy(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> engine.Metrics:
    """top1, top5, cross-entropy and calibration error of real examples, as (sum, count) pairs."""
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return {
        "top1": metrics_lib.topk_correct(logits, labels, mask, 1),
        "top5": metrics_lib.topk_correct(logits, labels, mask, 5),
        "loss": metrics_lib.mean(loss, mask),
        "ece": metrics_lib.calibration_gaps(logits, labels, mask),
    }
