"""A report of runs: a table on the terminal, a page that opens from a file, and a picture.

python -m launch.report runs/quickstart
python -m launch.report runs/a runs/b --output report.html --png result.png --baseline none
python -m launch.report runs/a --measure

Arms that one run trains side by side share its steps: --measure times each arm's own step, as `launch.bench distill`
does, on this machine, and keeps the figures in the first folder. It belongs to the report and not to the sweep because
runs that are no sweep have arms too, because nothing else may run on the machine meanwhile, and because it can be done
for runs that are finished.
"""

import argparse
import pathlib
import sys

from rich.console import Console

from research.core import config as configs
from research.core import storage
from research.core.errors import UserError, cli
from research.core.report import costs, measured, page, picture, summary, text

ROUNDS, STEPS = 5, 3  # of a measurement, and steps a round


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
    found.add_argument("--measure", action="store_true", help="time the arms' own steps first, where that is not done")
    found.add_argument("--traceback", action="store_true", help="show where an error arose")
    return found


def _check(file: str | None, suffix: str) -> None:
    if file and pathlib.Path(file).suffix != suffix:
        raise UserError(f"{file}: the name must end in {suffix}")


def measure(found: summary.Summary, folder: storage.Path) -> list[str]:
    """Times the arms of the summary's runs that are not yet in the folder's `measured.json`; returns what failed.

    Raises UserError where no run has arms.
    """
    from launch import bench_distill  # needs JAX, which a report does not

    rows, notes = list(measured.read([folder])), []
    if not any(run.config.get("students") for run in found.runs):
        raise UserError(f"--measure: {found.runs[0].folder} has no students; only arms of distillation are timed")
    for run in found.runs:
        students = run.config.get("students") or {}
        known = [arm for arm in students if measured.lookup(rows, run.config, arm)]
        if len(known) == len(students):
            continue
        config = configs.from_json((run.folder / configs.FILE).read_text()).unlock()
        for arm in known:
            del config.students[arm]
        bench = bench_distill.measure(bench_distill.prepared(config.lock()), ROUNDS, STEPS)
        rows += [(measured.identity(run.config, arm.name), bench.of(arm)) for arm in bench.arms]
        notes += bench.notes
    measured.write(folder, rows)
    return list(dict.fromkeys(notes))


@cli
def main(argv: list[str] | None = None) -> int:
    options, _ = configs.parse_args(parser(), argv, prefixes=())
    _check(options.output, ".html")
    _check(options.png, ".png")
    found = summary.collect(options.paths, options.baseline, options.metric)
    notes = []
    if options.measure:
        notes = measure(found, storage.folder(options.paths[0]))
        found = summary.collect(options.paths, options.baseline, options.metric)
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a log has no edge to wrap at
    console.print(text.table(found, console.width))
    console.print(text.headline(found), highlight=False, markup=False)
    console.print()
    console.print(costs.table(found, console.width))
    for note in (*found.notes, *notes):
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
