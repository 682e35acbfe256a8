"""All backbones with what they cost: `python -m research.backbones [PATTERN...]`; one by layer: `... summary NAME`.

PATTERN selects names as a shell does (`'vit_*'`). Parameters and multiply-adds are counted, not measured: nothing is
computed. Sources are arXiv numbers. The last column says what has been checked against the official code: `outputs` of
networks of the family on golden arrays, or only `counts` of parameters.
"""

import argparse
import fnmatch
import sys

import jax
import jax.numpy as jnp
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from research import backbones
from research.backbones import sources, summary
from research.core.cost import macs, params_count


def cost(name: str) -> tuple[int, int, int]:
    """(side of the image, parameters, multiply-adds an image) of variant `name`, at its published image size."""
    model, size, params = backbones.create(name), backbones.input_spec(name).size, []

    def forward(image):
        (logits, _), variables = model.init_with_output(jax.random.key(0), image)
        params.append(params_count(variables["params"]))
        return logits

    products = macs(forward, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    return size, params[0], products


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["summary"]:
        return summary.main(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m research.backbones", description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="PATTERN", help="names to show, such as 'vit_*'")
    patterns = parser.parse_args(argv).patterns
    chosen = [name for name in backbones.variants() if any(fnmatch.fnmatch(name, p) for p in patterns)]
    if not chosen:
        print(f"no backbone is named {' or '.join(patterns)}", file=sys.stderr)
        return 1
    table = Table("model", "family", "size", "params (M)", "GMACs", "source", "checked", box=box.SIMPLE)
    for column in table.columns[2:5]:
        column.justify = "right"
    console = Console()
    if not console.is_terminal:  # files and pipes keep whole names
        console = Console(width=120)
    for name in track(chosen, "counting", console=console, transient=True, disable=not console.is_terminal):
        size, params, products = cost(name)
        family = backbones.family(name).__name__.rsplit(".", 1)[-1]
        counts = str(size), f"{params / 1e6:.2f}", f"{products / 1e9:.3f}"
        table.add_row(name, family, *counts, sources.paper(name), sources.state(family))
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
