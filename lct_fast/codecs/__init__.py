"""What a tensor looks like on the wire between two groups."""

from __future__ import annotations

from lct_fast.codecs.cast import Cast
from lct_fast.codecs.codec import Codec
from lct_fast.codecs.identity import Identity

_CODECS: dict[str, Codec] = {"none": Identity(), "bf16": Cast("bf16")}


def names() -> list[str]:
    """Names ``build`` knows."""
    return list(_CODECS)


def build(name: str) -> Codec:
    """The codec called ``name``.

    Raises:
        ValueError: unknown name.
    """
    if name not in _CODECS:
        raise ValueError(f"unknown codec {name!r}: choose one of {', '.join(_CODECS)}")
    return _CODECS[name]


__all__ = ["Cast", "Codec", "Identity", "build", "names"]
