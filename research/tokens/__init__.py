"""Token reduction for vision transformers: one file a method, all plugged into the one ViT by its field `reduce`."""

from typing import Any


def parse(text: str) -> dict[str, Any]:
    """The plain values that a text on a command line stands for, see `research.layers.reduction.build`.

    `ppt:r=50,blocks=3+6+9,threshold=7e-5` is `{"method": "research.tokens.ppt", "r": 50, "blocks": (3, 6, 9),
    "threshold": 7e-5}`. A plus separates the entries of a sequence; one with a single entry ends in it, `blocks=3+`. A
    method with a dot in its name is an import path.

    Raises:
      ValueError: an option without a value.
    """
    name, _, rest = text.partition(":")
    found: dict[str, Any] = {"method": name if "." in name else f"{__name__}.{name}"}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise ValueError(f"{text!r}: write its options as {key}=<value>, commas between")
        parts = [_value(part) for part in value.split("+") if part]
        found[key] = tuple(parts) if "+" in value else parts[0]
    return found


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
