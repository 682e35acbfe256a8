"""A dense layer with several experts, of which each token uses one, and the loss that keeps them equally busy.

Sources: Switch Transformer, Fedus et al. 2022 (arXiv 2101.03961), equations 1-2 and 4-6; ParameterNet, Han et al. 2024
(arXiv 2306.14525, section 3.3), whose code puts such a layer in place of LLaMA's down projection. No capacity: every
token reaches its expert.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.layers.norm import accumulation_dtype

_EXPERT = re.compile(r"(.*\bexperts)\.expert_(\d+)\.(weight|bias)")


def route(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(expert, its probability) of each token, (...,) int32 and float32 or better, from logits (..., E).

    The first of equal experts wins.
    """
    probabilities = jax.nn.softmax(logits.astype(accumulation_dtype(logits)))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(probabilities, axis=-1)


def dispatch(x: jax.Array, expert: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Each row by its own expert's dense layer: `x[t] @ kernel[expert[t]] + bias[expert[t]]`.

    Rows are sorted by expert and multiplied in E runs, so the work is that of one expert and not of E.

    Args:
      x: (T, I); expert: (T,) int32 in [0, E); kernel: (E, I, O); bias: (E, O).
    Returns:
      (T, O) in the dtype of `x`.
    """
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=kernel.shape[0]).astype(jnp.int32)
    y = jax.lax.ragged_dot(x[order], kernel.astype(x.dtype), sizes)
    return y[jnp.argsort(order)] + bias[expert].astype(x.dtype)


def load_balancing_loss(logits: jax.Array, expert: jax.Array | None = None) -> jax.Array:
    """E^2 mean_{b,e}(f_be P_be): 1 where tokens and probabilities are spread evenly, E where all go to one expert.

    f is the share of a sequence's tokens that went to expert e and P the mean probability it had. The official code
    takes both over one sequence, all layers of the network concatenated along it; Switch takes them over the batch.

    Args:
      logits: router logits (B, S, E), of float32 or better inside; expert: (B, S) int, by default what `route` says.
    Returns:
      A scalar of float32 or better; its gradient reaches the logits through P alone.
    """
    count = logits.shape[-1]
    probabilities = jax.nn.softmax(logits.astype(accumulation_dtype(logits)))
    expert = route(logits)[0] if expert is None else expert
    share = jnp.mean(jax.nn.one_hot(expert, count, dtype=probabilities.dtype), axis=-2)
    return jnp.mean(share * jnp.mean(probabilities, axis=-2)) * count**2


class SwitchDense(nn.Module):
    """`p_k (W_k x + b_k)` of the most probable expert k: (..., I) -> (..., features), and router logits (..., E).

    Router and probabilities are float32 or better, the experts of `dtype`.

    Fields:
      num_experts: E, each with its own kernel and bias, stacked in `experts`.
      std: of the normal initialisation of router and experts.
    """

    features: int
    num_experts: int = 8
    std: float = 0.02
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        init = nn.initializers.normal(self.std)
        wide = accumulation_dtype(x)
        router = nn.Dense(self.num_experts, use_bias=False, kernel_init=init, dtype=wide, name="router_classifier")
        logits = router(x.astype(wide))
        expert, probability = route(logits)
        kernel, bias = _Experts(self.num_experts, x.shape[-1], self.features, self.std, name="experts")()
        rows = dispatch(x.astype(self.dtype).reshape(-1, x.shape[-1]), expert.reshape(-1), kernel, bias)
        y = rows.reshape(*x.shape[:-1], self.features)
        return (probability[..., None] * y.astype(probability.dtype)).astype(self.dtype), logits


class _Experts(nn.Module):
    """The stacked parameters, a module of their own for their official name."""

    count: int
    inputs: int
    features: int
    std: float

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (self.count, self.inputs, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.count, self.features))


def stack_experts(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An official state dict with `experts.expert_<k>` joined to one `experts`, as `research.port.names` wants them.

    Weights (O, I) become (O, I, E), biases (O,) become (E, O).
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    rest = {}
    for name, array in state.items():
        match = _EXPERT.fullmatch(name)
        if match:
            found.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = array
        else:
            rest[name] = array
    for name, arrays in found.items():
        rest[name] = np.stack([arrays[k] for k in range(len(arrays))], axis=-1 if name.endswith("weight") else 0)
    return rest


def unstack_experts(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `stack_experts`."""
    found = {}
    for name, array in state.items():
        match = re.fullmatch(r"(.*\bexperts)\.(weight|bias)", name)
        if not match:
            found[name] = array
            continue
        parts = np.moveaxis(array, -1, 0) if match[2] == "weight" else array
        found |= {f"{match[1]}.expert_{k}.{match[2]}": part for k, part in enumerate(parts)}
    return found
