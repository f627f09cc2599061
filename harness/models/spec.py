"""One small grammar for everything that a person names on a command line: `name` or `name:key=value,key=value`.

Values are read as an integer, a number, a shape such as 1x28x28, several numbers such as 0.9/0.999, true or false, else
as text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Splits `sgd:lr=0.1,momentum=0.9` into `("sgd", {"lr": 0.1, "momentum": 0.9})`.

    Raises: ValueError, naming the part that is not `key=value`.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{text!r}: {part!r} is not key=value; wanted e.g. {name}:key=value,key=value")
        options[key] = _value(value)
    return name, options


def choose(kind: str, text: str, choices: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The entry of `choices` that `text` names, and its options. Raises: ValueError, listing what there is."""
    name, options = parse_spec(text)
    if name not in choices:
        raise ValueError(f"{kind} {name!r} is not known; there are: {', '.join(choices)}")
    return choices[name], options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for pattern, kind in ((r"[+-]?\d+", int), (_NUMBER, float)):
        if re.fullmatch(pattern, text):
            return kind(text)
    if re.fullmatch(rf"{_NUMBER}(/{_NUMBER})+", text):
        return tuple(_value(number) for number in text.split("/"))
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(int(size) for size in text.split("x"))
    return text
