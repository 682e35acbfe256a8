"""A small experiment with everything that depends on the batch: batch norm, a relational loss, momentum, an average."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from research.core import scope
from research.core.experiment import Experiment, Output, supervised
from research.layers.norm import BatchNorm

CLASSES, SIDE, BATCH = 4, 8, 16


class Net(nn.Module):
    """Two convolutions with batch norm and a classifier, wide enough for fsdp and tensor rules to split."""

    group: int | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        for width in (16, 64):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(BatchNorm(group=self.group)(x, train))
        return nn.Dense(CLASSES)(jnp.mean(x, axis=(1, 2)))


def relation(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """A loss of all pairs in the batch: similar labels should have similar logits."""
    unit = logits / (jnp.linalg.norm(logits, axis=-1, keepdims=True) + 1e-6)
    same = (labels[:, None] == labels[None, :]).astype(jnp.float32)
    return jnp.mean(jnp.square(unit @ unit.T - same))


def build(*, group: int | None = None, accumulate: int = 1, ema=(0.9,), poison: int = -1) -> Experiment:
    """The toy Experiment; the loss is NaN from step `poison` on."""
    net = Net(group)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True))

    def init(key):
        variables = dict(net.init(key, jnp.zeros((1, SIDE, SIDE, 3)), train=False))
        return variables.pop("params"), variables

    def loss(params, model_state, batch, context):
        variables = {"params": params, **model_state}
        logits, new = net.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        value = jnp.mean(cross) + scope.by_group(relation, group, logits, batch["label"])
        if poison >= 0:
            value = jnp.where(jnp.any(batch["index"] >= poison * BATCH), jnp.nan, value)
        count = jnp.asarray(len(cross), jnp.float32)
        return value, Output(dict(new), {"loss": (value * count, count)})

    def evaluate(params, model_state, batch, frozen):
        logits = net.apply({"params": params, **model_state}, batch["image"], train=False)
        hit = (jnp.argmax(logits, -1) == batch["label"]).astype(jnp.float32)
        return {"top1": (jnp.sum(hit * batch["mask"]), jnp.sum(batch["mask"]))}

    return supervised(init, loss, evaluate, optimizer, accumulate=accumulate, ema=ema)


@functools.cache
def dataset(size: int = 512):
    """Four kinds of coloured noise, learnable in a few steps."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, size).astype(np.int32)
    images = rng.normal(size=(size, SIDE, SIDE, 3)).astype(np.float32)
    images += np.eye(CLASSES, 3, dtype=np.float32)[labels][:, None, None, :]
    return images, labels


def batches(start: int, *, process: int = 0, processes: int = 1):
    """Endless global batches from a step on: this process's rows."""
    images, labels = dataset()
    share = BATCH // processes
    step = start
    while True:
        rows = (np.arange(BATCH) + step * BATCH)[process * share : (process + 1) * share]
        at = rows % len(labels)
        yield {
            "image": images[at],
            "label": labels[at],
            "index": rows.astype(np.int32),
            "mask": np.ones(share, np.float32),
        }
        step += 1


def held_out(size: int, *, process: int = 0, processes: int = 1):
    """One pass over `size` examples: this process's rows of each global batch, filled up with rows of mask 0."""
    images, labels = dataset()
    share = BATCH // processes
    for start in range(0, size, BATCH):
        rows = (np.arange(BATCH) + start)[process * share : (process + 1) * share]
        at = rows % len(labels)
        yield {"image": images[at], "label": labels[at], "mask": (rows < size).astype(np.float32)}
