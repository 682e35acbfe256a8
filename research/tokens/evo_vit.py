"""Evo-ViT: the patches that the class token looks at are computed slowly, the others wait, and none is ever lost.

Source: Xu et al. 2022 (arXiv 2108.01390) and the official code (YifanXu74/Evo-ViT, `deit/`). A running mean of the
class token's attention ranks the patches. At the start of a stage the better half goes on alone; at its end the others,
as they were, are put behind it. So the method also serves where every patch has to come out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.backbones import vit
from research.layers.attention import attend, class_row
from research.layers.dense import Dense
from research.layers.norm import LayerNorm, accumulation_dtype
from research.layers.reduction import Reduction, Tokens
from research.tokens.moves import finite, follow, lost, ranked, rows
from research.tokens.policies import behind


class Memory(NamedTuple):
    """What travels with the tokens, in their order: `attention` (B, P) of all patches; of a stage, the patches `rest`
    (B, P - M, C) that wait, the `origin` (B, N0) of all tokens, and `added` (B, 1, C), the token that stands for them.
    """

    attention: jax.Array | None = None
    rest: jax.Array | None = None
    origin: jax.Array | None = None
    added: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class EvoViT(Reduction):
    """See `reduction`."""

    stages: tuple[tuple[int, int | None], ...]
    keep: tuple[float, ...]
    tradeoff: tuple[float, ...] | float
    representative: bool
    patches: int = 0

    def bind(self, depth: int, patches: int, class_token: bool, distilled: bool) -> "EvoViT":
        if not class_token:
            raise ValueError("Evo-ViT ranks patches by the class token's attention: use class_token=True")
        if max(self.stages[-1][0] + 1, self.stages[-1][1] or 0) > depth:
            raise ValueError(f"stages={self.stages}: the network has {depth} blocks")
        if not isinstance(self.tradeoff, float) and len(self.tradeoff) != depth:
            raise ValueError(f"tradeoff={self.tradeoff}: give one number, or one for each of {depth} blocks")
        if int(min(self.keep) * patches) < 1:
            raise ValueError(f"keep={self.keep}: a rate leaves none of {patches} patches")
        return dataclasses.replace(super().bind(depth, patches, class_token, distilled), patches=patches)

    def left(self, block: int, tokens: int) -> int:
        raise ValueError("Evo-ViT changes tokens between blocks: research.tokens.policy_macs counts its work")

    def start(self, x: jax.Array) -> Tokens:
        return super().start(x)._replace(memory=Memory())

    def before(self, tokens: Tokens, block: int, train: bool) -> Tokens:
        for (first, _), keep in zip(self.stages, self.keep, strict=True):
            if block == first:
                tokens = self._select(tokens, int(self.patches * keep), block)
        memory = tokens.memory
        if not self.representative or memory.rest is None:
            return tokens
        added = _summary(memory.rest, memory.attention[:, -memory.rest.shape[1] :])
        return tokens._replace(x=jnp.concatenate([tokens.x, added], axis=1), memory=memory._replace(added=added))

    def attend(self, tokens: Tokens, block: int, train: bool, q, k, v, bias, scale) -> tuple[jax.Array, Any]:
        row = jax.lax.stop_gradient(jnp.sum(class_row(q, k, bias, scale), axis=1))
        return attend(q, k, v, bias, scale), row

    def reduce(self, tokens: Tokens, block: int, train: bool, seen: jax.Array) -> Tokens:
        memory = tokens.memory
        new = seen[:, self.prefix : -1 if memory.added is not None else None]
        if memory.attention is not None:
            share = self.tradeoff if isinstance(self.tradeoff, float) else self.tradeoff[block]
            old, waiting = jnp.split(memory.attention, [new.shape[1]], axis=1)
            new = jnp.concatenate([(1 - share) * old + share * new, waiting], axis=1)
        return tokens._replace(memory=memory._replace(attention=new))

    def after(self, tokens: Tokens, block: int, train: bool) -> Tokens:
        x, memory = tokens.x, tokens.memory
        if memory.added is not None:
            x, added = x[:, :-1], x[:, -1:]
            memory = memory._replace(rest=memory.rest + (added - memory.added), added=None)
        if block + 1 in [last for _, last in self.stages]:
            x = jnp.concatenate([x, memory.rest], axis=1)
            tokens = tokens._replace(origin=memory.origin)
            memory = memory._replace(rest=None, origin=None)
        return tokens._replace(x=x, memory=memory)

    def _select(self, tokens: Tokens, count: int, block: int) -> Tokens:
        """The first tokens and the `count` patches of largest attention; the rest into the memory."""
        attention = finite("attention", tokens.memory.attention)
        order = ranked(attention)
        every = behind(self.prefix, order)
        x, origin, attention = (
            rows(tokens.x, every),
            follow(tokens.origin, lost(every, every[:, :0])),
            rows(attention, order),
        )
        x, rest = jnp.split(x, [self.prefix + count], axis=1)
        memory = Memory(attention, rest, origin)
        tokens = tokens._replace(x=x, origin=jnp.where(origin < x.shape[1], origin, -1), memory=memory)
        return tokens.noted(block, attention=attention, order=order)


def _summary(rest: jax.Array, attention: jax.Array) -> jax.Array:
    """Mean of patches (B, P, C) weighted by their attention (B, P): (B, 1, C) (equation 6)."""
    wide = rest.astype(accumulation_dtype(rest))
    weight = attention / jnp.sum(attention, axis=1, keepdims=True)
    return jnp.sum(wide * weight.astype(wide.dtype)[..., None], axis=1, keepdims=True).astype(rest.dtype)


def reduction(
    stages: tuple[tuple[int, int | None], ...] = ((4, 8), (8, 12)),
    keep: float | tuple[float, ...] = 0.5,
    *,
    tradeoff: float | tuple[float, ...] = 0.5,
    representative: bool = False,
) -> EvoViT:
    """Evo-ViT's reduction, for the field `reduce` of a ViT with a class token; adds no parameters.

    Tokens come out complete, in another order: the endpoint `origin` says where each one is. Endpoints of a stage's
    first block, `block05_...`: `attention` (B, P) of all patches in descending order and their `order` (B, P).

    Args:
      stages: (first block, block after the last) of the stages, counted from 0. A last stage that ends with None leaves
        its waiting patches out of the result (official `prunecls`).
      keep: share of the patches that a stage computes, rounded down; one rate for all stages or one each.
      tradeoff: share of a block's own attention in the running mean, for all blocks or one each.
      representative: the waiting patches are computed as one token, their mean weighted by attention, and each receives
        what that token does (the paper's fast updating). The official DeiT code leaves them as they are, the default.
    Raises:
      ValueError: stages that overlap or begin at block 0, rates or shares outside (0, 1].
    """
    stages = tuple((first, last) for first, last in stages)
    rates = (float(keep),) * len(stages) if isinstance(keep, float | int) else tuple(keep)
    ended = [(first, first + 1 if last is None else last) for first, last in stages]
    edges = [edge for stage in ended for edge in stage]
    wrong = any(first >= last for first, last in ended) or any(last is None for _, last in stages[:-1])
    if not stages or wrong or edges[0] < 1 or edges != sorted(edges):
        raise ValueError(
            f"stages={stages}: give ascending (first, last) pairs from block 1 on; block 0 ranks the patches"
        )
    if len(rates) != len(stages) or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"keep={keep}: give a rate in (0, 1], or one for each of {len(stages)} stages")
    tradeoff = float(tradeoff) if isinstance(tradeoff, float | int) else tuple(map(float, tradeoff))
    if not all(0 <= share <= 1 for share in (tradeoff if isinstance(tradeoff, tuple) else (tradeoff,))):
        raise ValueError(f"tradeoff={tradeoff}: shares lie in [0, 1]")
    return EvoViT(stages=stages, keep=rates, tradeoff=tradeoff, representative=representative)


class Network(vit.ViT):
    """The published network: a ViT classifying the mean of its patches, with a second classifier for the class token.

    `ViT` with `global_pool` "avg". The endpoint `head_cls` (B, num_classes) holds the second classifier's logits, whose
    loss is added to that of the first in training; evaluation does not use it.
    """

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, endpoints = super().__call__(images, train)
        if self.num_classes:
            seen = LayerNorm(self.norm_eps, self.dtype, name="norm_cls")(endpoints["tokens"][:, 0])
            options = {"kernel_init": vit.normal, "dtype": self.dtype, "name": "head_cls"}
            endpoints["head_cls"] = Dense(self.num_classes, **options)(seen)
        return logits, endpoints


def build(**arguments) -> Network:
    """Evo-DeiT: arguments of `research.backbones.vit.ViT`, with `reduce` by default that of the published models."""
    return Network(**{"global_pool": "avg", "reduce": reduction(), **arguments})


# Evo-DeiT's names differ from DeiT's in the attention, whose queries and keys are one layer and values another.
NAMES = [(r"^blocks_(\d+)", r"blocks.\1"), (r"^fc_norm", "norm")]


def to_deit(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An official Evo-ViT state dict under DeiT's names, with queries, keys and values joined.

    `norm_cls` and `head_cls` keep their names; a state without them is one whose `remove_cls()` was called.

    Raises:
      ValueError: the queries and keys of a block without its values.
    """
    renamed = {}
    for name, array in state.items():
        layer, _, rest = name.partition(".")
        index, _, leaf = rest.partition(".")
        if layer == "qks":
            values = f"vs.{index}.v.{leaf.removeprefix('qk.')}"
            if values not in state:
                raise ValueError(f"no Evo-ViT checkpoint: it has {name} but not {values}")
            joined = np.concatenate([np.asarray(array), np.asarray(state[values])])
            renamed[f"blocks.{index}.attn.qkv.{leaf.removeprefix('qk.')}"] = joined
        elif layer in ("norms", "projs"):
            renamed[f"blocks.{index}.{'norm1' if layer == 'norms' else 'attn.proj'}.{leaf}"] = array
        elif layer != "vs":
            renamed[name] = array
    return renamed


def from_deit(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `to_deit`: DeiT's weights under Evo-ViT's names, rows of `qkv` split into 2C and C."""
    renamed = {}
    for name, array in state.items():
        block, _, leaf = name.removeprefix("blocks.").partition(".")
        if not name.startswith("blocks."):
            renamed[name] = array
        elif leaf.startswith("attn.qkv."):
            width, kind = array.shape[0] // 3, leaf.removeprefix("attn.qkv.")
            renamed[f"qks.{block}.qk.{kind}"], renamed[f"vs.{block}.v.{kind}"] = array[: 2 * width], array[2 * width :]
        elif leaf.startswith("attn.proj."):
            renamed[f"projs.{block}.{leaf.removeprefix('attn.proj.')}"] = array
        elif leaf.startswith("norm1."):
            renamed[f"norms.{block}.{leaf.removeprefix('norm1.')}"] = array
        else:
            renamed[name] = array
    return renamed
