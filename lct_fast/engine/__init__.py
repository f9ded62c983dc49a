"""The engine: groups, what crosses between them, and the loop that trains them. It knows no formula."""

from lct_fast.engine.group import Group
from lct_fast.engine.split import split
from lct_fast.engine.trainer import NonFiniteError, OutOfMemoryError, Stats, Trainer

__all__ = ["Group", "NonFiniteError", "OutOfMemoryError", "Stats", "Trainer", "split"]
