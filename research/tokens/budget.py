"""Multiply-adds of a ViT whose tokens become fewer, in closed form, and the reduction that meets a budget
of them or a target of images a second.

The measure is that of the published counts, torchprofile's: beside matrix products and convolutions it counts one for
each output of a layer norm and of an elementwise product, as the scaling of attention scores. `research.core.cost`
counts the products of a traced network alone.
"""

import bisect
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

from research.backbones.vit import ViT
from research.layers.reduction import Reduction

Value = TypeVar("Value", int, float)
NONE_FITS = "none of them fits the network"


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
    fitting = _fitting(model, make, values)
    affordable = [entry for entry in fitting if entry[1].total <= budget]
    if not affordable:
        least = f"the cheapest needs {min(cost.total for _, cost in fitting):,}" if fitting else NONE_FITS
        raise ValueError(f"no value meets a budget of {budget:,.0f} multiply-adds: {least}")
    return max(affordable, key=lambda entry: entry[1].total)


class Reached(NamedTuple):
    """What `solve_throughput` found.

    Fields:
      value: of the reduction.
      macs: multiply-adds of the network with it.
      rates: images a second of every value that was timed, in the order in which they were.
    """

    value: int | float
    macs: Macs
    rates: dict[int | float, float]


def solve_throughput(
    model: ViT,
    target: float,
    make: Callable[[Value], Reduction],
    values: Iterable[Value],
    rate: Callable[[ViT], float],
) -> Reached:
    """The reduction that takes least from the network among those that reach a throughput, which `rate` measures.

    By bisection, as fewer multiply-adds are taken to be faster: of n values at most log2(n) + 1 are timed, each of
    which is a network to compile. Where times scatter, so does the value.

    Args:
      model, make, values: as of `solve`.
      target: images a second, at least.
      rate: network -> its images a second, on the device and at the batch size in question.
    Raises:
      ValueError: no value reaches the target; the text says what the fastest does.
    """
    by_work = {cost.total: (value, cost) for value, cost in reversed(_fitting(model, make, values))}
    ordered = [by_work[total] for total in sorted(by_work, reverse=True)]
    rates: dict[int | float, float] = {}

    def reached(entry: tuple[Value, Macs]) -> bool:
        rates[entry[0]] = rate(model.clone(reduce=make(entry[0])))
        return rates[entry[0]] >= target

    at = bisect.bisect_left(ordered, True, key=reached)
    if at == len(ordered):
        most = f"the fastest does {rates[ordered[-1][0]]:.4g}" if ordered else NONE_FITS
        raise ValueError(f"no value reaches {target:.4g} images/s: {most}")
    return Reached(*ordered[at], rates)


def _fitting(model: ViT, make: Callable[[Value], Reduction], values: Iterable[Value]) -> list[tuple[Value, Macs]]:
    """The values whose reductions fit the network, with its multiply-adds."""
    found = []
    for value in values:
        try:
            found.append((value, macs(model.clone(reduce=make(value)))))
        except ValueError:
            continue
    return found
