"""What a transformer knows of token reduction: the state that travels through its blocks, and where it may change.

A network with a field `reduce` calls a `Reduction` at four places of every block; the methods live in
`research.tokens`, and a network without one computes what it always did.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from research.layers.attention import attend


class Tokens(NamedTuple):
    """The tokens between two blocks and what is known of them.

    Fields:
      x: (B, N, C).
      origin: (B, N0) integers, which of the N tokens holds each of the N0 tokens the network began with; -1 for those
        that no token holds. It is the source map in index form (see `research.tokens.moves`).
      size: (B, N), how many of the first tokens each one stands for; None where all stand for one or nobody asks.
      memory: what the method itself carries on.
      record: what the network adds to its endpoints.
    """

    x: jax.Array
    origin: jax.Array
    size: jax.Array | None = None
    memory: Any = None
    record: dict[str, jax.Array] = {}  # noqa: RUF012  (never changed in place)

    def noted(self, block: int, **values: jax.Array) -> "Tokens":
        """With `values` recorded under `block04_<name>`, numbered from 1 as the endpoints of the blocks are."""
        return self._replace(record=self.record | {f"block{block + 1:02d}_{k}": v for k, v in values.items()})


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How a network's tokens become fewer. This one leaves them as they are; methods override what they need.

    An instance is a plain value: hashable, equal to another one with equal fields. Blocks count from 0.

    Fields, which `bind` sets:
      class_token, distilled: whether the first token, and the second, stand for the image and not for a patch.
    """

    class_token: bool = dataclasses.field(default=True, kw_only=True)
    distilled: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def prefix(self) -> int:
        """Number of tokens before those of the patches."""
        return int(self.class_token) + int(self.distilled)

    def bind(self, depth: int, patches: int, class_token: bool, distilled: bool) -> "Reduction":
        """This reduction for a network of `depth` blocks that begins with `patches` patches.

        Raises:
          ValueError: it does not fit the network.
        """
        return dataclasses.replace(self, class_token=class_token, distilled=distilled)

    def left(self, block: int, tokens: int) -> int:
        """How many of `tokens` a block leaves, of a bound reduction."""
        return tokens

    def overhead(self, block: int, tokens: int, width: int, heads: int) -> int:
        """What the method itself computes in a block that `tokens` enter, as `research.tokens.budget` counts."""
        return 0

    def start(self, x: jax.Array) -> Tokens:
        """The state before the first block, of tokens (B, N0, C)."""
        return Tokens(x, jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2]))

    def before(self, tokens: Tokens, block: int, train: bool) -> Tokens:
        """Before a block. Called in the scope of the network: Flax modules made here are its children."""
        return tokens

    def attend(self, tokens: Tokens, block: int, train: bool, q, k, v, bias, scale) -> tuple[jax.Array, Any]:
        """In the place of `research.layers.attention.attend`: its result, and what `reduce` wants to know of it."""
        return attend(q, k, v, bias, scale), None

    def reduce(self, tokens: Tokens, block: int, train: bool, seen: Any) -> Tokens:
        """Between attention and MLP: `tokens.x` includes the attention's residual, `seen` is from `attend`."""
        return tokens

    def after(self, tokens: Tokens, block: int, train: bool) -> Tokens:
        """After a block, in the scope of the network."""
        return tokens


def build(spec: Reduction | Mapping[str, Any] | None) -> Reduction | None:
    """The reduction that plain values describe, as configs hold them; a Reduction passes, and None, which is none.

    Args:
      spec: `method`, the import path of a module with a function `reduction`, such as `research.tokens.ppt`, and the
        arguments of that function.
    Raises:
      ValueError: no such module, or arguments that its function does not take.
    """
    if spec is None or isinstance(spec, Reduction):
        return spec
    options = dict(spec)
    method = options.pop("method", "")
    try:
        make = importlib.import_module(method).reduction
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and not method.startswith(error.name or "."):
            raise
        wanted = "the import path of a module with a function `reduction`, such as research.tokens.ppt"
        raise ValueError(f"reduce.method: {method!r} is not {wanted}") from None
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"reduce: {method} does not take {options}: {error}") from error
