"""A report of runs: a table on the terminal, a page that opens from a file, and a picture.

python -m launch.report runs/quickstart
python -m launch.report runs/a runs/b --output report.html --png result.png --baseline none
"""

import argparse
import pathlib
import sys

from rich.console import Console

from research.core import config as configs
from research.core import storage
from research.core.errors import UserError, cli
from research.core.report import page, picture, summary, text


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        prog="python -m launch.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("paths", nargs="+", metavar="FOLDER", help="run folders, sweeps, or folders of runs")
    found.add_argument("--output", metavar="FILE", help="the page (report.html in the first folder)")
    found.add_argument("--png", metavar="FILE", help="a picture of the result")
    found.add_argument("--baseline", metavar="ARM", help="the arm that gaps are taken to (one named like `none`)")
    found.add_argument("--metric", metavar="NAME", help="the evaluation metric to compare by (top1)")
    found.add_argument("--traceback", action="store_true", help="show where an error arose")
    return found


def _check(file: str | None, suffix: str) -> None:
    if file and pathlib.Path(file).suffix != suffix:
        raise UserError(f"{file}: the name must end in {suffix}")


@cli
def main(argv: list[str] | None = None) -> int:
    options, _ = configs.parse_args(parser(), argv, prefixes=())
    _check(options.output, ".html")
    _check(options.png, ".png")
    found = summary.collect(options.paths, options.baseline, options.metric)
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a log has no edge to wrap at
    console.print(text.table(found, console.width))
    console.print(text.headline(found), highlight=False, markup=False)
    for note in found.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)
    output = storage.folder(options.output or storage.folder(options.paths[0]) / "report.html")
    storage.write(output, page.page(found))
    written = [str(output)]
    if options.png:
        picture.save(found, pathlib.Path(options.png))
        written.append(options.png)
    console.print(f"wrote {', '.join(written)}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
