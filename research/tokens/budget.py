"""Multiply-adds of a ViT whose tokens become fewer, in closed form, and the reduction that meets a budget.

The measure is that of the published counts, torchprofile's: beside matrix products and convolutions it counts one for
each output of a layer norm and of an elementwise product, as the scaling of attention scores. `research.core.cost`
counts the products of a traced network alone.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from research.backbones.vit import ViT
from research.layers.reduction import Reduction

Value = TypeVar("Value", int, float)


class Macs(NamedTuple):
    """Multiply-adds of one image, by what they are spent on."""

    patch_embed: int
    projections: int
    attention: int
    mlp: int
    heads: int
    norms: int
    scaling: int
    reduction: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def products(self) -> int:
        """Those of the network's matrix products and convolutions, without the reduction's own."""
        return self.patch_embed + self.projections + self.attention + self.mlp + self.heads


def _sides(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _patches(model: ViT) -> int:
    (height, width), (rows, columns) = _sides(model.img_size), _sides(model.patch_size)
    return (height // rows) * (width // columns)


def _bound(model: ViT) -> Reduction:
    return (model.reduce or Reduction()).bind(model.depth, _patches(model), model.class_token, model.distilled)


def tokens(model: ViT) -> list[tuple[int, int]]:
    """(tokens in the attention, tokens in the MLP) of every block."""
    reduce, count, counts = _bound(model), _patches(model) + model.prefix, []
    for block in range(model.depth):
        left = reduce.left(block, count)
        counts.append((count, left))
        count = left
    return counts


def macs(model: ViT) -> Macs:
    """Multiply-adds of one image of `model.img_size`, with `model.reduce` or without.

    Raises:
      ValueError: a network whose norms or poolings the measure was not checked on (layer scale, `pre_norm`, pooling
        `avg`, kinds of ViT such as LV-ViT, for which see `policy_macs`), or a reduction that does not fit it.
    """
    if type(model) is not ViT or model.init_values is not None or model.pre_norm or model.global_pool != "token":
        raise ValueError("multiply-adds are known in closed form for plain ViT and DeiT, classified by their tokens")
    reduce, counts, width = _bound(model), tokens(model), model.embed_dim
    rows, columns = _sides(model.patch_size)
    hidden = int(model.mlp_ratio * width)
    last = counts[-1][1] if counts else _patches(model) + model.prefix
    return Macs(
        patch_embed=_patches(model) * rows * columns * 3 * width,
        projections=sum(4 * n * width**2 for n, _ in counts),
        attention=sum(2 * n * n * width for n, _ in counts),
        mlp=sum(2 * m * width * hidden for _, m in counts),
        heads=model.prefix * width * model.num_classes,
        norms=sum((n + m) * width for n, m in counts) + last * width,
        scaling=sum(model.num_heads * n * n for n, _ in counts),
        reduction=sum(reduce.overhead(i, n, width, model.num_heads) for i, (n, _) in enumerate(counts)),
    )


def solve(model: ViT, budget: float, make: Callable[[Value], Reduction], values: Iterable[Value]) -> tuple[Value, Macs]:
    """The reduction that spends most of a budget: `solve(model, 2.9e9, lambda r: ppt.reduction(r), range(1, 99))`.

    Args:
      model: the network, with any `reduce` or none.
      budget: multiply-adds of one image, at most.
      make: value -> reduction.
      values: what to choose from; those whose reduction does not fit the network are passed over.
    Returns:
      (the value, its multiply-adds); the first of equal ones.
    Raises:
      ValueError: no value stays within the budget; the text says what the cheapest needs.
    """
    found, cheapest = None, None
    for value in values:
        try:
            cost = macs(model.clone(reduce=make(value)))
        except ValueError:
            continue
        cheapest = cost.total if cheapest is None else min(cheapest, cost.total)
        if cost.total <= budget and (found is None or cost.total > found[1].total):
            found = value, cost
    if found is None:
        least = "none of them fits the network" if cheapest is None else f"the cheapest needs {cheapest:,}"
        raise ValueError(f"no value meets a budget of {budget:,.0f} multiply-adds: {least}")
    return found
