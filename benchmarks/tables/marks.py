"""Blocks of a page that are made from result files: found between two comments that Markdown does not show.

    <!-- table: digits -->
    ...
    <!-- end -->

Each mark has a line to itself. Lines inside a code fence are no marks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_BEGIN = re.compile(r"<!--\s*table:\s*(\S*)\s*-->")
_END = re.compile(r"<!--\s*end\s*-->")
_FENCE = re.compile(r"\s*(```|~~~)")


class MarkError(ValueError):
    """A mark that cannot be followed: page, line, and what to do."""


@dataclass(frozen=True)
class Block:
    """``name`` stands in line ``line`` of the page, from 1; ``text`` is what stands below it, without the marks."""

    name: str
    line: int
    text: str


def blocks(page: str, content: str) -> list[Block]:
    """The blocks of a page, in order. Raises `MarkError` for a mark that has no counterpart."""
    found: list[Block] = []

    def keep(block: Block) -> str:
        found.append(block)
        return block.text

    replaced(page, content, keep)
    return found


def filled(page: str, content: str, made: Mapping[str, str]) -> str:
    """The page with the text of each block taken from ``made``. Raises `MarkError` for a name that is not there."""

    def text(block: Block) -> str:
        if block.name not in made:
            raise MarkError(
                f"{page}:{block.line}: no table is called {block.name!r}: take a name of "
                "benchmarks/tables/registry.py, or add it there"
            )
        return made[block.name]

    return replaced(page, content, text)


def replaced(page: str, content: str, text: Callable[[Block], str]) -> str:
    """The page with ``text(block)`` in place of what each block holds."""
    out: list[str] = []
    # The open block's name and line, and where in ``out`` its text begins.
    open_: tuple[str, int, int] | None = None
    fenced = False
    for number, line in enumerate(content.splitlines(), 1):
        if _FENCE.match(line):
            fenced = not fenced
        begin, end = (
            (None, None) if fenced else (_BEGIN.fullmatch(line.strip()), _END.fullmatch(line.strip()))
        )
        if begin and open_:
            raise MarkError(
                f"{page}:{number}: {line.strip()} inside {open_[0]!r} of line {open_[1]}: "
                "put <!-- end --> before it"
            )
        if end:
            if not open_:
                raise MarkError(
                    f"{page}:{number}: {line.strip()} ends nothing: put <!-- table: NAME --> before it, or remove it"
                )
            name, at, start = open_
            block = Block(name, at, "\n".join(out[start:]))
            out[start:] = text(block).splitlines()
            open_ = None
        out.append(line)
        if begin:
            open_ = (begin[1], number, len(out))
    if open_:
        raise MarkError(f"{page}:{open_[1]}: table {open_[0]!r} has no end: put <!-- end --> behind it")
    return "\n".join(out) + "\n"
