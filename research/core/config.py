"""Configurations: one Python file an experiment, typed overrides, and a run folder that remembers its own.

A config file defines `get_config(arg) -> ml_collections.ConfigDict`. `load` calls it with what stands after the colon
of `configs/x.py:arg`, applies `--config.key=value` overrides and locks the result. In a loaded config every sequence is
a tuple and every dict a locked ConfigDict, also inside sequences: a config read back from JSON equals the one written.
"""

import argparse
import fnmatch
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from research.core import storage
from research.core.errors import UserError
from research.core.overrides import PREFIX, apply, freeze, has_groups, parse, suggest, thaw

FILE = "config.json"
# Patterns of the keys that a resumed run may change: how often it writes, on what it runs, where its teacher is.
MAY_CHANGE = ("log.*", "save.*", "*workers", "parallel.*", "teacher.workdir")
_ABSENT = object()


def load(argument: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of `path/to/file.py:arg` with overrides applied.

    Args:
      argument: a path (from the current folder, else from the folder that holds the `configs` package) or a dotted
        module name, then optionally `:` and the text given to `get_config`.
      overrides: texts `--config.key=value`, where key is dotted and may index lists: `--config.students.0.loss=dkd`.
        The value takes the type of the one it replaces (see research.core.overrides); later ones win.
    Raises:
      FileNotFoundError: no such file; the message names the nearest.
      UserError: no such key (the message names the nearest), a value of the wrong type, or one that JSON cannot hold.
    """
    path, _, arg = argument.partition(":")
    module = _module(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path}: defines no get_config(arg)")
    config = module.get_config(arg)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returned {type(config).__name__}, expected an ml_collections.ConfigDict")
    config = thaw(config.unlock())
    for override in overrides:
        apply(config, override)
    return freeze(config)


def _module(path: str) -> ModuleType:
    roots = [pathlib.Path.cwd(), _home()]
    found = [root / path for root in roots if (root / path).is_file()]
    if found:
        name = "stillroom_config_" + "".join(c if c.isalnum() else "_" for c in str(found[0].resolve()))
        spec = importlib.util.spec_from_file_location(name, found[0])
        if spec is None:
            raise UserError(f"{path}: not a Python file; a config is a .py file that defines get_config(arg)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickling look their module up by name
        spec.loader.exec_module(module)
        return module
    dotted = path.removesuffix(".py").replace("/", ".")
    if all(part.isidentifier() for part in dotted.split(".")) and _exists(dotted):
        return importlib.import_module(dotted)
    raise FileNotFoundError(f"no config file {path}{suggest(path, _files(roots))}")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _home() -> pathlib.Path:
    spec = importlib.util.find_spec("configs")
    return pathlib.Path(spec.origin).parents[1] if spec and spec.origin else pathlib.Path.cwd()


def _files(roots: Sequence[pathlib.Path]) -> list[str]:
    found = {str(file.relative_to(root)): None for root in roots for file in sorted(root.glob("configs/**/*.py"))}
    return [name for name in found if not name.endswith("__init__.py")]


def parse_arg(arg: str, **defaults: bool | int | float | str) -> ConfigDict:
    """The text after the colon as named options: `parse_arg('smoke,res=128', smoke=False, res=224)`.

    A bare name switches a bool on. Returns a ConfigDict of the defaults with the given values, typed like them.
    Raises UserError for an option that has no default, naming the nearest.
    """
    values = dict(defaults)
    for item in filter(None, arg.split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            near = suggest(name, list(defaults)) or f" (options: {', '.join(defaults)})"
            raise UserError(f"config argument {item!r}: no such option{near}")
        values[name] = parse(f"config argument {name}", text if equals else "true", defaults[name])
    return ConfigDict(values).lock()


def parse_args(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, prefixes: Sequence[str] = (PREFIX,)
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a launcher's arguments; returns (its own options, the `--config.key=value` texts).

    Raises UserError for any other unknown argument, naming the nearest option.
    """
    known, extra = parser.parse_known_args(argv)
    for text in extra:
        if not text.startswith(tuple(prefixes)):
            options = [option for action in parser._actions for option in action.option_strings]
            raise UserError(f"{text}: no such option{suggest(text.partition('=')[0], options)} (--help lists all)")
        if "=" not in text:
            raise UserError(f"{text}: write it with an equals sign, {text}=<value>")
    return known, extra


def get(config: ConfigDict, path: str, default: Any = _ABSENT) -> Any:
    """The value at a dotted path that may index sequences, as in `students.0.loss`.

    Raises KeyError where nothing is there and no default is given.
    """
    node = config
    for part in path.split("."):
        if isinstance(node, (tuple, list)) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, (ConfigDict, dict)) and part in node:
            node = node[part]
        elif default is _ABSENT:
            raise KeyError(path)
        else:
            return default
    return node


def plain(config: Any) -> Any:
    """The config as dicts, lists and scalars, as JSON holds it."""
    if isinstance(config, (ConfigDict, dict)):
        return {key: plain(config[key]) for key in config}
    if isinstance(config, (list, tuple)):
        return [plain(item) for item in config]
    return config


def to_json(config: ConfigDict) -> str:
    """The config as indented JSON with sorted keys: equal configs give equal texts."""
    return json.dumps(plain(config), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The locked config written by `to_json`. Raises UserError where the text is not one."""
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not a config: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"not a config: a JSON {type(tree).__name__}, expected an object")
    return freeze(tree)


def flat(config: ConfigDict | dict) -> dict[str, Any]:
    """Dotted name -> value of every leaf; lists of scalars, and empty groups, are leaves."""
    leaves: dict[str, Any] = {}

    def visit(node: Any, prefix: str) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if value and (isinstance(value, dict) or has_groups(value)):
                visit(value, f"{prefix}{key}.")
            else:
                leaves[f"{prefix}{key}"] = value

    visit(plain(config), "")
    return leaves


def changes(a: ConfigDict | dict, b: ConfigDict | dict) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value in a, value in b) where they differ; None also stands for a key that is not there."""
    old, new = flat(a), flat(b)
    names = [*old, *(name for name in new if name not in old)]
    return {n: (old.get(n), new.get(n)) for n in names if old.get(n, _ABSENT) != new.get(n, _ABSENT)}


def difference(a: ConfigDict | dict, b: ConfigDict | dict) -> list[str]:
    """Lines `key: old -> new` for every leaf that differs between the two configs."""
    old, new = flat(a), flat(b)

    def show(leaves: dict[str, Any], name: str) -> str:
        return json.dumps(leaves[name]) if name in leaves else "(absent)"

    return [f"{name}: {show(old, name)} -> {show(new, name)}" for name in changes(a, b)]


def claim(workdir: str | os.PathLike, config: ConfigDict, ignore: Sequence[str] = MAY_CHANGE) -> bool:
    """Makes `workdir` the run folder of `config`; returns whether it already was, so that the run resumes.

    A new folder gets config.json, written whole or not at all. A folder of the same config is left as it is; keys that
    match the patterns in `ignore` may differ.

    Raises:
      UserError: the folder belongs to another config (the message lists the difference and the ways out), its
        config.json cannot be read, or it holds a run without one. Nothing is written then.
    """
    folder = storage.folder(workdir)
    file = folder / FILE
    if not file.exists():
        left = [name for name in ("checkpoints", "metrics.jsonl") if (folder / name).exists()]
        if left:
            raise UserError(f"{folder}: holds {left[0]} but no {FILE}, so it cannot be resumed; use another --workdir")
        folder.mkdir(parents=True, exist_ok=True)
        if storage.create(file, to_json(config)):
            return False
    lines = mismatch(folder, config, ignore)
    if lines:
        raise UserError(
            f"{folder} belongs to a run with another config:\n  "
            + "\n  ".join(lines)
            + "\nrun it with the same config to resume it, or use another --workdir"
        )
    return True


def mismatch(workdir: str | os.PathLike, config: ConfigDict, ignore: Sequence[str] = MAY_CHANGE) -> list[str]:
    """Lines `key: theirs -> ours` where `config` differs from that of the run folder; none for a folder without one.

    Raises UserError where the folder's config.json cannot be read.
    """
    file = storage.folder(workdir) / FILE
    if not file.exists():
        return []
    try:
        old = from_json(file.read_text())
    except UserError as error:
        raise UserError(f"{file}: {error}; use another --workdir, or restore the file") from None

    def kept(leaves: dict[str, Any]) -> dict[str, Any]:
        return {key: v for key, v in leaves.items() if not any(fnmatch.fnmatchcase(key, p) for p in ignore)}

    return difference(kept(flat(old)), kept(flat(config)))
