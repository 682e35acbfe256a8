"""Perplexity of causal language models by the protocol that papers on compressed models quote for WikiText-2.

The tokens of all texts, one after the other, are cut into windows of `context` tokens that do not overlap, and what is
left over is dropped. A window's tokens but the first are predicted from those before them in the window; the perplexity
is the exponential of the mean loss over all of them (GPTQ, Frantar et al. 2023, and its code).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from research.language.losses import IGNORED_LABEL, token_losses


def windows(tokens, context: int) -> np.ndarray:
    """`tokens` (T,) int as windows (T // context, context) int32.

    Raises:
      ValueError: `context` is below 2, or there are fewer tokens than one window holds.
    """
    tokens = np.asarray(tokens, np.int32).reshape(-1)
    if context < 2 or len(tokens) < context:
        raise ValueError(
            f"context={context} tokens a window: give at least 2, and a text of as many (it has {len(tokens)})"
        )
    return tokens[: len(tokens) // context * context].reshape(-1, context)


def perplexity(apply: Callable, variables, tokens, *, context: int = 2048, batch: int = 1) -> float:
    """Perplexity of a model on a text.

    Args:
      apply: `apply(variables, tokens (batch, context) int)` gives logits (batch, context, V), or those and endpoints,
        as `model.apply` does. It is compiled once for every function object.
      tokens: the text, (T,) int; see `research.language.tokens.encode`.
      batch: windows at a time; the result does not depend on it.
    Raises:
      ValueError: no whole window, or a loss that is not finite.
    """
    rows = windows(tokens, context)
    losses = 0.0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
        real = np.arange(batch) < len(part)
        losses += float(_loss(apply, variables, padded, real))
    mean = losses / (len(rows) * (context - 1))
    if not math.isfinite(mean):
        raise ValueError(f"the model's loss on this text is {mean}: its weights or activations are not finite")
    return math.exp(mean)


@functools.partial(jax.jit, static_argnums=0)
def _loss(apply, variables, tokens, real):
    """Sum of the losses of the `real` (B,) bool windows among `tokens` (B, N)."""
    out = apply(variables, tokens)
    logits = out[0] if isinstance(out, tuple) else out
    labels = jnp.where(real[:, None], tokens[:, 1:], IGNORED_LABEL)
    return token_losses(logits[:, :-1], labels)[0]
