"""Overrides of a config from a command line: `--config.key=value`, typed by the value it replaces."""

import ast
import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference, config_dict

from research.core.errors import UserError

PREFIX = "--config."
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
SCALARS = (bool, int, float, str)


def parse(key: str, text: str, like: Any, kind: type | None = None) -> Any:
    """The value that `text` gives to `key`, typed by the value it replaces.

    Args:
      key: the option as the user wrote it, for the message.
      text: what stands after the equals sign.
      like: the present value. None takes any Python literal, or else the text itself.
      kind: the type of a value that is not set yet (a placeholder).
    Returns:
      A bool, int, float, str, tuple or None. `None` is accepted for every type: it switches an option off.
    Raises:
      UserError: the text is not of that type, or the value is a group of keys.
    """
    kind = type(like) if like is not None else kind
    if text == "None" or (text == "none" and kind is not str):  # "none" may be a word, such as a kind of crop
        return None
    if kind in (tuple, list):
        return _sequence(key, text, tuple(like or ()))
    if kind in SCALARS:
        return _scalar(key, text, kind)
    if kind in (None, type(None)):
        return _tuples(_literal(text))
    raise UserError(f"{key}: is a group of keys and takes no value; set one of its keys, {key}.<key>=<value>")


def _scalar(key: str, text: str, kind: type) -> bool | int | float | str:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise UserError(f"{key}: expected true or false, got {text!r}")
    try:
        number = float(text)
        if kind is float:
            return number
        # `1e5` and `1_000` are how people write large whole numbers; int() of the text keeps all digits where it can.
        return int(text) if "e" not in text.lower() and "." not in text else _whole(number)
    except (ValueError, OverflowError):
        expected = "a number" if kind is float else "a whole number"
        raise UserError(f"{key}: expected {expected}, got {text!r}") from None


def _whole(number: float) -> int:
    if number != int(number):
        raise ValueError
    return int(number)


def _sequence(key: str, text: str, like: tuple) -> tuple:
    if like and all(isinstance(item, (tuple, list)) for item in like):
        value = _tuples(_literal(text))
        if not isinstance(value, tuple) or not all(isinstance(item, tuple) for item in value):
            example = [list(item) for item in like]
            raise UserError(f"{key}: expected a list of lists such as {example}, got {text!r}")
        return value
    if any(isinstance(item, (dict, tuple, list)) or hasattr(item, "items") for item in like):
        raise UserError(f"{key}: is a list of groups and takes no value; set one entry, {key}.0.<key>=<value>")
    items = _split(text)
    kinds = {type(item) for item in like}
    if kinds == {int, float}:
        kinds = {float}
    if len(kinds) == 1 and (kind := kinds.pop()) in SCALARS:
        return tuple(None if item in ("None", "none") else _scalar(key, item, kind) for item in items)
    return tuple(_tuples(_literal(item)) for item in items)


def _split(text: str) -> list[str]:
    """`(1, 2)`, `[1, 2]`, `1,2` and `'a', 'b'` as the texts of their items."""
    value = _literal(text)
    if isinstance(value, (tuple, list)):
        return [item if isinstance(item, str) else repr(item) for item in value]
    text = text.strip()
    if text[:1] + text[-1:] in ("()", "[]"):
        text = text[1:-1]
    return [item.strip() for item in text.split(",") if item.strip()]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def suggest(wrong: str, names: Sequence[str], prefix: str = "") -> str:
    """`; did you mean X?` with the nearest of `names`, by whole name and last part; empty where none is near."""

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def last(name: str) -> str:
        return name.removesuffix(".py").replace("/", ".").rpartition(".")[2]

    scores = {name: (likeness(wrong, name), likeness(last(wrong), last(name))) for name in names}
    near = [name for name, (whole, tail) in scores.items() if whole >= 0.75 or tail >= 0.7]
    return f"; did you mean {prefix}{max(near, key=lambda name: sum(scores[name]))}?" if near else ""


def apply(config: ConfigDict, override: str) -> None:
    """Applies one `--config.key=value` to an unlocked config, in place; its sequences are lists (see `thaw`).

    A group called `options` holds keyword arguments of something else, and takes new keys.

    Raises UserError for a key that is not there, naming the nearest, and for a value of another type.
    """
    name, equals, text = override.partition("=")
    if not name.startswith(PREFIX) or not equals:
        raise UserError(f"{override}: an override is written {PREFIX}key=value")
    *parents, last = name.removeprefix(PREFIX).split(".")
    node = config
    for part in parents:
        node = _entry(node, _place(config, node, name, part))
    if parents[-1:] == ["options"] and isinstance(node, ConfigDict) and last not in node:
        node[last] = parse(name, text, None)  # keyword arguments: the constructor that takes them knows their names
        return
    place = _place(config, node, name, last)
    kind = _kind(node, place) if isinstance(node, ConfigDict) else None
    _put(node, place, parse(name, text, _entry(node, place), kind))


def _place(config: ConfigDict, node: Any, name: str, part: str) -> str | int:
    """The key or index that `part` of the option `name` means in `node`; an error names the nearest option."""
    if isinstance(node, list):
        if part.isdecimal() and int(part) < len(node):
            return int(part)
        raise UserError(f"{name}: {part!r} is no entry of a list of {len(node)}; entries are numbered from 0")
    if isinstance(node, ConfigDict) and part in node:
        return part
    near = suggest(name.removeprefix(PREFIX), list(_names(config)), PREFIX)
    keys = ", ".join(node) if isinstance(node, ConfigDict) else ""
    raise UserError(f"{name}: no such key{near or (f' (keys there: {keys})' if keys else '')}")


def _names(node: ConfigDict | list, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys, a group before its keys."""
    for place in node if isinstance(node, ConfigDict) else range(len(node)):
        yield f"{prefix}{place}"
        value = _entry(node, place)
        if isinstance(value, ConfigDict) or has_groups(value):
            yield from _names(value, f"{prefix}{place}.")


def has_groups(value: Any) -> bool:
    """Whether `value` is a sequence that holds groups of keys."""
    return isinstance(value, (list, tuple)) and any(isinstance(item, (ConfigDict, dict)) for item in value)


def _entry(node: ConfigDict | list, place: str | int) -> Any:
    """What is at `place`, references followed; None for a placeholder that still needs its value."""
    try:
        value = node[place]
        return value.get() if isinstance(value, FieldReference) else value
    except config_dict.RequiredValueError:
        return None


def _kind(node: ConfigDict, place: str) -> type:
    """The type that a config holds for what is at `place`, also of a placeholder that still needs its value."""
    try:
        return node.get_type(place)
    except config_dict.RequiredValueError:
        return node.get_ref(place).get_type()


def _put(node: ConfigDict | list, place: str | int, value: Any) -> None:
    if isinstance(node, list):
        node[place] = value
    else:
        with node.ignore_type():
            node[place] = value


def thaw(node: Any) -> Any:
    """The same tree, ConfigDicts in place, with lists for sequences and ConfigDicts for the dicts inside them."""
    if isinstance(node, (list, tuple)):
        return [thaw(item) for item in node]
    if isinstance(node, dict):
        return thaw(ConfigDict(node))
    if isinstance(node, ConfigDict):
        for key in node:
            value = _entry(node, key)
            if isinstance(value, (ConfigDict, list, tuple)):
                _put(node, key, thaw(value))
    return node


def freeze(node: Any, key: str = "") -> Any:
    """The loaded form: references resolved, tuples for sequences, locked ConfigDicts for groups, Python's own scalars.

    Raises UserError for what JSON cannot hold and for a placeholder without its value; `key` is the name of `node`.
    """
    if isinstance(node, FieldReference):
        node = node.get()
    if isinstance(node, (ConfigDict, dict)):
        items = {}
        for name in node:
            path = f"{key}.{name}" if key else str(name)
            try:
                items[name] = freeze(node[name], path)
            except config_dict.RequiredValueError:
                raise UserError(f"{PREFIX}{path}: needs a value; add {PREFIX}{path}=<value>") from None
        return ConfigDict(items).lock()
    if isinstance(node, (list, tuple)):
        return tuple(freeze(item, f"{key}.{index}") for index, item in enumerate(node))
    if hasattr(node, "dtype") and hasattr(node, "item") and not getattr(node, "shape", ()):
        node = node.item()
    if node is None or type(node) in SCALARS:
        return node
    raise UserError(f"{PREFIX}{key}: a config holds numbers, text, lists and groups of them, not {type(node).__name__}")
