"""Measurements: `python -m launch.bench NAME ...` runs `launch.bench_NAME`, e.g. `train` or `data`."""

import importlib
import pathlib
import sys

from research.core.config import suggest
from research.core.errors import UserError, cli


def names() -> list[str]:
    """The measurements there are: the modules `launch/bench_<name>.py` that have a `main(argv)`."""
    files = sorted(pathlib.Path(__file__).parent.glob("bench_*.py"))
    return [file.stem.removeprefix("bench_") for file in files if "\ndef main(argv" in file.read_text()]


@cli
def main(argv: list[str]) -> int | None:
    """Hands the arguments after the name to that measurement; raises UserError for a name that does not exist."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\nusage: python -m launch.bench {{{','.join(names())}}} [options]")
        return 0 if argv else 2
    name, *rest = argv
    if name not in names():
        raise UserError(f"no measurement {name!r}{suggest(name, names())} (there are {', '.join(names())})")
    return importlib.import_module(f"launch.bench_{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
