"""GPT4Image: captions of the training images, embedded once by a text encoder, supervise the image features too.

Source: Ding et al. 2023 (arXiv 2306.00693), in the form of the authors' code (huawei-noah/Efficient-Computing). A head
that is thrown away after training takes the pooled feature to the text space, where one of three losses pulls it to the
embedding of its own caption; the total is CE + lambda * loss. `research.distill.text_targets` makes the embeddings, and
an arm of `research.distill.vanilla_kd` with `hint='gpt4image'` finds them as the teacher's endpoint `text`.

Images z and texts e are (B, D); e has unit rows and is a constant, z is normalised here.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from research.core import scope
from research.distill import taps
from research.distill.hints import Hint, zeros
from research.distill.numerics import gram, unit, wide
from research.layers.init import torch_bias
from research.layers.norm import BatchNorm

HEADS = ("mlp", "linear")


def byol(image: jax.Array, text: jax.Array) -> jax.Array:
    """2 - 2 cos(z, e), (B,)."""
    image, text = _pair(image, text)
    return 2 - 2 * jnp.sum(image * text, axis=-1)


def ctr(image: jax.Array, text: jax.Array, *, tau: float = 0.2) -> jax.Array:
    """Cross-entropy (B,) of each image finding its own text among those of the batch, by cosines over `tau`."""
    image, text = _pair(image, text)
    return _diagonal(gram(image, text) / tau)


def clip(image: jax.Array, text: jax.Array, *, tau: float = 0.2) -> jax.Array:
    """The mean (B,) of `ctr` and of each text finding its own image; equal texts count as each other's negatives."""
    image, text = _pair(image, text)
    logits = gram(image, text) / tau
    return (_diagonal(logits) + _diagonal(logits.T)) / 2


def _pair(image: jax.Array, text: jax.Array) -> list[jax.Array]:
    image, text = wide(image, jax.lax.stop_gradient(text))
    return [unit(image), text]


def _diagonal(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(logits.shape[0]))


TEXT_LOSSES = {"byol": byol, "ctr": ctr, "clip": clip}


class TextHead(nn.Module):
    """The pooled feature (B, C) in the text space, (B, features).

    Fields:
      kind: `mlp` (two layers with a ReLU between them) or `linear` (one, without bias).
      hidden: width of the MLP, twice `features` by default.
      norm: batch norm between the layers, whose first then has no bias: the authors' ResNets have it, DeiTs not.
      init_std: of the normal initial weights; the authors' are 1/32 for ResNets and 0.02 for DeiTs.
      group: examples a batch-norm group, see `research.layers.norm.BatchNorm`.
    """

    features: int
    kind: str = "mlp"
    hidden: int | None = None
    norm: bool = True
    init_std: float = 1 / 32
    group: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        options = {"kernel_init": nn.initializers.normal(self.init_std), "dtype": self.dtype}
        if self.kind == "linear":
            return nn.Dense(self.features, use_bias=False, name="linear", **options)(x)
        hidden = self.hidden or 2 * self.features
        bias = torch_bias(x.shape[-1])
        x = nn.Dense(hidden, use_bias=not self.norm, bias_init=bias, name="fc1", **options)(x)
        x = BatchNorm(group=self.group, dtype=self.dtype, name="bn")(x, train) if self.norm else x
        return nn.Dense(self.features, bias_init=torch_bias(hidden), name="fc2", **options)(nn.relu(x))


# Official names. The last layer's number counts the batch norm in.
NAMES = {
    True: [(r"^linear\.", "proj_layer."), (r"^fc1\.", "proj_layer.0."), (r"^bn\.", "proj_layer.1.")]
    + [(r"^fc2\.", "proj_layer.3.")],
    False: [(r"^linear\.", "proj_layer."), (r"^fc1\.", "proj_layer.0."), (r"^fc2\.", "proj_layer.2.")],
}


def hint(
    *,
    loss: str = "clip",
    tau: float = 0.2,
    kind: str = "mlp",
    norm: bool = True,
    init_std: float = 1 / 32,
    student: str = "pooled",
    teacher: str = "text",
    group: int | None = None,
    dtype: jnp.dtype = jnp.float32,
) -> Hint:
    """One of the text losses between a student's endpoint, through a `TextHead`, and the teacher's `text`.

    `clip` contrasts the global batch, whatever the devices; `ctr` groups of `group` examples, as a GPU had them (None:
    the global batch). The published runs averaged gradients of `clip` that each GPU took of its own rows only, so their
    lambda of 0.3 is 0.3 / GPUs here, where the gradient is the whole one.

    Args:
      loss: `byol`, `ctr` or `clip`.
      tau: temperature of `ctr` and `clip`; the authors' is 0.2 for ResNets and 0.05 for DeiTs.
      kind, norm, init_std: of the head.
      student, teacher: names of the endpoints, (B, C) and (B, D), whose rows are unit vectors.
      group: examples a batch-norm group of the head, and a batch of `ctr`.
    Raises:
      ValueError: an unknown loss or kind of head.
    """
    if loss not in TEXT_LOSSES:
        raise ValueError(f"loss={loss!r}: choose one of {', '.join(TEXT_LOSSES)}")
    if kind not in HEADS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(HEADS)}")
    function, options = TEXT_LOSSES[loss], {} if loss == "byol" else {"tau": tau}
    names = {"student": student, "teacher": teacher}

    def bind(student, teacher):
        text = taps.tap(teacher, names["teacher"])
        head = TextHead(text.shape[-1], kind, norm=norm, init_std=init_std, group=group, dtype=dtype)
        return head, taps.tap(student, names["student"]), text

    def init(key, student, teacher):
        head, feature, _ = bind(zeros(student), zeros(teacher))
        variables = head.init(key, feature, train=False)
        return variables["params"], {"batch_stats": variables.get("batch_stats", {})}

    def apply(params, state, student, teacher, *, labels=None, index=None, key=None, epoch=0):
        head, feature, text = bind(student, teacher)
        image, state = head.apply({"params": params, **state}, feature, mutable=["batch_stats"])
        mean = lambda *pair: jnp.mean(function(*pair, **options))
        if loss == "byol":
            value = mean(image, text)
        else:
            value = scope.by_group(mean, group if loss == "ctr" else None, image, text)
        return value, {"batch_stats": state.get("batch_stats", {})}

    return Hint(init, apply)
