"""Modules by name, where each file of a package is a family with a table `VARIANTS` of its published sizes."""

import difflib
import functools
import importlib
from typing import Any, NamedTuple


class Catalogue(NamedTuple):
    """The families of a package.

    Fields:
      package: its import path; families: the names of its modules, each with `VARIANTS` {variant: constructor
        arguments} and `build(**arguments)`.
      kind: what messages call a variant; listing: what they say of where all are listed.
    """

    package: str
    families: tuple[str, ...]
    kind: str
    listing: str

    def variants(self) -> list[str]:
        """All variant names, in family order."""
        return list(_table(self))

    def family(self, name: str):
        """The module that defines variant `name`; a ValueError names the nearest variant."""
        table = _table(self)
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {self.kind} {name!r}{hint} ({self.listing})")
        return importlib.import_module(f"{self.package}.{table[name]}")

    def create(self, name: str, **overrides: Any):
        """What the family builds for variant `name`, with constructor arguments overridden; errors as of `family`."""
        module = self.family(name)
        return module.build(**{**module.VARIANTS[name], **overrides})


@functools.cache
def _table(catalogue: Catalogue) -> dict[str, str]:
    modules = {name: importlib.import_module(f"{catalogue.package}.{name}") for name in catalogue.families}
    return {variant: name for name, module in modules.items() for variant in module.VARIANTS}
