"""The layers of one backbone with what each costs: `python -m research.backbones summary NAME`.

Nothing is computed: layers, parameters and multiply-adds are read off the traced network. Layers without parameters or
products have no row. Networks with binary layers have two more columns, the multiply-adds of one bit and the OPs.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.table import Table

from research import backbones
from research.core.cost import Layer, Operations, by_layer


def layers(name: str, *, size: int | None = None, depth: int | None = None) -> list[Layer]:
    """Rows of `research.core.cost.by_layer` for one image of variant `name`.

    Args:
      size: side of the image in pixels; the published one by default.
      depth: levels of nesting kept apart.
    Raises:
      ValueError: an unknown name, or an image size that the network does not take.
    """
    model, size = backbones.create(name), size or backbones.input_spec(name).size
    model = model.clone(img_size=size) if hasattr(model, "img_size") else model
    return by_layer(model, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), depth=depth)


def table(rows: list[Layer]) -> Table:
    """The rows and their sum."""
    binary = any(row.binary for row in rows)
    shown = Table("layer", "params", "MACs", *(("of one bit", "OPs") if binary else ()), box=box.SIMPLE)
    for column in shown.columns[1:]:
        column.justify = "right"

    def add(path: str, params: int, macs: int, bits: int) -> None:
        more = (f"{bits:,}", f"{Operations(bits, macs - bits).total:,.0f}") if binary else ()
        shown.add_row(path, f"{params:,}", f"{macs:,}", *more)

    for row in rows:
        add(row.path or "(the network itself)", *row[1:])
    shown.add_section()
    add("total", *(sum(column) for column in zip(*(row[1:] for row in rows), strict=True)))
    return shown


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m research.backbones summary", description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help="a variant of research.backbones")
    parser.add_argument("--depth", type=int, help="levels of nesting to keep apart; all by default")
    parser.add_argument("--size", type=int, help="side of the image; the published one by default")
    options = parser.parse_args(argv)
    try:
        rows = layers(options.name, size=options.size, depth=options.depth)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    return 0
