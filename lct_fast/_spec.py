"""The `name:key=value,key=value` strings that choose a model or a critic on the command line and in YAML.

The options of an entry are the keyword-only parameters of the callable that builds it: their defaults give
the types, so a builder's signature is the only place an option is written down.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def parse_spec(
    spec: str, kind: str, builders: Mapping[str, Callable[..., Any]]
) -> tuple[str, dict[str, Any]]:
    """Split `spec` into the entry's name and its options, typed by the builder's defaults.

    Args:
        spec: `"name"` or `"name:key=value,key=value"`; spaces around the parts are ignored.
        kind: what is being chosen, for messages ("model", "critic").
        builders: name -> callable whose keyword-only parameters are the options, each with an int, float or
            str default.

    Raises:
        ValueError: unknown name or option, an option given twice, or a value of the wrong type; one line
            that lists what exists.
    """
    name, _, tail = spec.partition(":")
    name = name.strip()
    if name not in builders:
        raise ValueError(f"unknown {kind} {name!r} in {spec!r}: choose one of {', '.join(sorted(builders))}")
    known = _options(builders[name])
    options: dict[str, Any] = {}
    for part in tail.split(",") if tail.strip() else []:
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not (key and equals and text):
            raise ValueError(f"{kind} {spec!r}: expected key=value after the colon, got {part.strip()!r}")
        if key not in known:
            listed = ", ".join(f"{option}={default}" for option, default in known.items()) or "none"
            raise ValueError(f"{kind} {name!r} has no option {key!r}; its options and defaults: {listed}")
        if key in options:
            raise ValueError(f"{kind} {spec!r}: option {key!r} is given twice")
        options[key] = _convert(text, known[key], f"{kind} {name!r}: option {key!r}")
    return name, options


def _options(builder: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(builder).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _convert(text: str, default: Any, what: str) -> Any:
    wanted = type(default)
    try:
        return wanted(text)
    except ValueError:
        raise ValueError(f"{what} expects {wanted.__name__}, got {text!r}") from None
