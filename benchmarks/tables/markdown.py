"""Pieces of Markdown: tables, wrapped paragraphs, numbers as the pages write them."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence

_WIDTH = 120
# Code, the text of a link, and a number with its percent sign stay on one line.
_WHOLE = re.compile(r"`[^`]*`|\[[^]]*\]\([^)]*\)|\d %")
_HELD = "\x00"
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every row has as many cells as ``head``."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"expected {len(head)} cells, {', '.join(head)}; got {', '.join(row)}")
        lines.append("| " + " | ".join(row) + " |")
    # An empty cell is one space.
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def paragraph(*sentences: str, first: str = "", rest: str = "") -> str:
    """Sentences as one paragraph, wrapped; ``first`` and ``rest`` begin its lines. Empty sentences are left out."""
    text = _WHOLE.sub(lambda match: match[0].replace(" ", _HELD), " ".join(s for s in sentences if s))
    filled = textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled.replace(_HELD, " ")


def bullet(*sentences: str) -> str:
    """Sentences as one item of a list, wrapped."""
    return paragraph(*sentences, first="- ", rest="  ")


def listed(items: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def word(count: int) -> str:
    """A small number in letters."""
    return _WORDS[count] if count < len(_WORDS) else f"{count:,}"


def spread(mean: float, deviation: float | None, digits: int = 2) -> str:
    """``99.17 ± 0.52``; the mean alone where there is no deviation."""
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def between(values: Sequence[float], form: str = ".0f") -> str:
    """``7 to 28``; one number where both ends read the same."""
    low, high = (format(v, form) for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def at_most(value: float, step: float = 1.0) -> str:
    """The least multiple of ``step``, 1 or 0.1, that is not below ``value``."""
    # 0.3 / 0.1 is a little less than 3, and what is a multiple stays one.
    up = math.ceil(value / step - 1e-9) * step
    return f"{up:.0f}" if step == 1 else f"{up:.1f}"
