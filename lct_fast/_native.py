"""The native module `lct_fast._C`, loaded on first use and never needed for import."""

from functools import cache
from importlib import import_module
from types import ModuleType

_BUILD = "run `make build` in a checkout, or `pip install .` where a C++17 compiler is"


@cache
def _attempt() -> tuple[ModuleType | None, str]:
    try:
        return import_module("lct_fast._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "lct_fast._C":
            return None, f"lct_fast._C does not import: {error}; {_BUILD}"
        return None, f"lct_fast._C is not built; {_BUILD}"
    except ImportError as error:
        # Built for another interpreter, or a library of the system is missing: the loader's words say which.
        return None, f"lct_fast._C does not load here: {error}; {_BUILD}"


def load() -> ModuleType | None:
    """The native module, or None where it is absent; the first call loads it."""
    return _attempt()[0]


def why_absent() -> str:
    """Empty where the module loads; otherwise why not, and what would help."""
    return _attempt()[1]
