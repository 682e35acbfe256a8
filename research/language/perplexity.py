"""Perplexity of causal language models by the protocol that papers on compressed models quote for WikiText-2.

The tokens of all texts, one after the other, are cut into windows of `context` tokens that do not overlap, and what is
left over is dropped. A window's tokens but the first are predicted from those before them in the window; the perplexity
is the exponential of the mean loss over all of them (GPTQ, Frantar et al. 2023, and its code).
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

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


class Score(NamedTuple):
    """What a model makes of a text.

    Fields:
      perplexity: of a token; word_perplexity: of a word, of which white space separates two; bits_per_byte: of UTF-8.
      tokens, words, bytes: of the text.

    The latter two of the first line compare models of different tokenisers. They count the tokens that are not asked
    for (the first of a window, what is left over) as if they were as hard as the others.
    """

    perplexity: float
    word_perplexity: float
    bits_per_byte: float
    tokens: int
    words: int
    bytes: int


def score(apply: Callable, variables, tokens, text: str, **options) -> Score:
    """The `Score` of a model on `text`, whose tokens are `tokens` (T,) int; options and errors as of `perplexity`."""
    found, words, size = perplexity(apply, variables, tokens, **options), len(text.split()), len(text.encode())
    total = math.log(found) * len(tokens)
    of_words = math.exp(min(total / max(words, 1), math.log(sys.float_info.max)))
    return Score(found, of_words, total / size / math.log(2), len(tokens), words, size)


@functools.partial(jax.jit, static_argnums=0)
def _loss(apply, variables, tokens, real):
    """Sum of the losses of the `real` (B,) bool windows among `tokens` (B, N)."""
    out = apply(variables, tokens)
    logits = out[0] if isinstance(out, tuple) else out
    labels = jnp.where(real[:, None], tokens[:, 1:], IGNORED_LABEL)
    return token_losses(logits[:, :-1], labels)[0]
