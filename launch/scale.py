"""The scale study: what configs need and how far they scale on pods, compiled ahead, as one Markdown table.

    python -m launch.scale --output launch/README.md

Every point is one `launch.compile` of the train step, kept as a JSON file in --cache, so that a run that was cut short
goes on where it stopped. The global batch stays what the recipe says (strong scaling): more chips, fewer images a chip.
A new family is one more line in STUDIES. Exit status: 0, or 1 where a point could not be compiled for another reason
than memory.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

from launch.compile import FITS, OUT_OF_MEMORY
from research.core import config as configs
from research.core.errors import UserError, cli
from research.pods import chips
from research.pods.tables import gib, seconds

BEGIN, END = "<!-- scale study: begin -->", "<!-- scale study: end -->"


class Study(NamedTuple):
    """One row group of the table: a name and the config's argument and overrides."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()


STUDIES = (
    Study("ResNet-50", "configs/distill/vanilla_kd_r50_a2.py"),
    Study("ViT-S/16", "configs/distill/vanilla_kd_vit_s_a2.py"),
    Study("ViT-L/16, fsdp 8", "configs/distill/vanilla_kd_vit_l_a2.py"),
)
# The largest first: with few images a chip a program compiles in two minutes, with 256 in ten or more.
TOPOLOGIES = ("v5e:16x16*2", "v5e:16x16", "v5e:8x16", "v5e:4x8", "v5e:2x4")


def point_file(cache: pathlib.Path, study: Study, topology: str) -> pathlib.Path:
    """Where a point is kept."""
    stem = "".join(c if c.isalnum() else "_" for c in f"{pathlib.Path(study.config).stem} {study.name} {topology}")
    return cache / f"{stem}.json"


def cached(cache: pathlib.Path, study: Study, topology: str) -> dict | None:
    """A point that was compiled before with the same config and overrides."""
    file = point_file(cache, study, topology)
    found = json.loads(file.read_text()) if file.exists() else None
    return found if found and found["study"] == json.loads(json.dumps(study)) else None


def run_point(cache: pathlib.Path, study: Study, topology: str) -> dict:
    """Compiles one point in a process of its own and keeps it; raises UserError with the last line of a failure."""
    command = [sys.executable, "-m", "launch.compile", "--config", study.config, "--topology", topology]
    command += ["--train-only", "--json", *study.overrides]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (FITS, OUT_OF_MEMORY):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{study.name} on {topology}: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found |= {"study": list(study), "compile_seconds": time.perf_counter() - begin}
    cache.mkdir(parents=True, exist_ok=True)
    draft = point_file(cache, study, topology).with_suffix(".part")
    draft.write_text(json.dumps(found, indent=1) + "\n")
    draft.replace(point_file(cache, study, topology))
    return found


def table(points: list[tuple[Study, str, dict | None]]) -> str:
    """The points as Markdown; those that were not run say so."""
    head = ["student", "topology", "chips", "images a chip", "memory a chip", "of it state", "compute", "main memory"]
    head += ["network", "operations", "step", "images/s", "MFU", "bottleneck, then"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_row(*point)) + " |" for point in points]
    return "\n".join(lines)


def _row(study: Study, topology: str, found: dict | None) -> list[str]:
    cells = [study.name, f"`{topology}`"]
    if found is None:
        return [*cells, "not run", *[""] * 11]
    state = sum(found["memory"][k] for k in found["memory"] if k in STATE)
    cells += [str(found["chips"]), f"{found['examples'] / found['chips']:g}", gib(found["peak_bytes"]), gib(state)]
    if not found["fits"]:
        return [*cells, "OUT OF MEMORY", *[""] * 6, _advice(found)]
    times = {name: found[f"{key}_seconds"] for name, key in RESOURCES.items()}
    order = sorted(times, key=times.get, reverse=True)
    cells += [seconds(time) for time in times.values()]
    cells += [seconds(found["step_seconds"]), f"{found['examples_per_second']:,.0f}", f"{found['mfu']:.0%}"]
    return [*cells, f"{order[0]}, {order[1]}"]


STATE = ("parameters", "model state", "optimiser", "moving averages", "frozen networks")
RESOURCES = {"compute": "compute", "main memory": "memory", "network": "network", "operations": "cycles"}


def _advice(found: dict) -> str:
    return f"`{found['suggestions'][0]}` should fit" if found["suggestions"] else "no setting fits"


def write(file: pathlib.Path, text: str) -> None:
    """Puts the table between the two marks of a file; raises UserError where it has none."""
    old = file.read_text()
    if BEGIN not in old or END not in old:
        raise UserError(f"{file}: has no lines {BEGIN} and {END} to put the table between")
    head, tail = old.partition(BEGIN)[0], old.partition(END)[2]
    file.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--cache", default="runs/scale", help="folder of the points compiled so far")
    found.add_argument("--minutes", type=float, default=0, help="start no point after this long; 0: run all")
    found.add_argument("--only", default="", help="names of studies, joined by semicolons")
    found.add_argument("--topologies", default=",".join(TOPOLOGIES), help="joined by commas")
    found.add_argument("--output", default="", help="Markdown file with marks to put the table between")
    return found


@cli
def main(argv: list[str]) -> int:
    options, _ = configs.parse_args(parser(), argv, prefixes=())
    names = [name.strip() for name in options.only.split(";") if name.strip()]
    known = [study.name for study in STUDIES]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only: no study {unknown[0]!r}{configs.suggest(unknown[0], known)} (there are {known})")
    studies = [study for study in STUDIES if not names or study.name in names]
    topologies = options.topologies.split(",")
    cache, begin, failures = pathlib.Path(options.cache), time.perf_counter(), []
    for topology in topologies:
        for study in studies:
            late = options.minutes and time.perf_counter() - begin > 60 * options.minutes
            if late or cached(cache, study, topology):
                continue
            print(f"{study.name} on {topology} ...", file=sys.stderr, flush=True)
            try:
                run_point(cache, study, topology)
            except UserError as error:
                failures.append(str(error))
                print(error, file=sys.stderr)
            if options.output:  # at each point, as the next may take long
                write(pathlib.Path(options.output), study_text(cache, studies, topologies))
    text = study_text(cache, studies, topologies)
    print(text)
    if options.output:
        write(pathlib.Path(options.output), text)
    return 1 if failures else 0


def study_text(cache: pathlib.Path, studies: list[Study], topologies: list[str]) -> str:
    """The table of all cached points, by study and number of chips."""
    points = [(study, topology, cached(cache, study, topology)) for study in studies for topology in topologies]
    size = {topology: chips.parse(topology).chips for topology in topologies}
    return table(sorted(points, key=lambda p: (studies.index(p[0]), size[p[1]])))


if __name__ == "__main__":
    sys.exit(main())
