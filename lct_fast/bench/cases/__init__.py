"""The benchmarks, one file a stem: every module in here that is found has `BENCHES`, a tuple of `Bench`."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from lct_fast.bench.case import Bench


@cache
def by_stem() -> dict[str, tuple[Bench, ...]]:
    """Every benchmark, by the name of its file."""
    stems = sorted(module.name for module in iter_modules(__path__))
    return {stem: import_module(f"{__name__}.{stem}").BENCHES for stem in stems}


def find(names: list[str]) -> list[Bench]:
    """The benchmarks of these names, a stem standing for all of its; all for none.

    Raises:
        ValueError: there is none of that name.
    """
    stems = by_stem()
    known = {bench.name: bench for benches in stems.values() for bench in benches}
    found: dict[str, Bench] = {}
    for name in names or known:
        if name not in known and name not in stems:
            raise ValueError(f"no benchmark named '{name}'; there are {', '.join(known)}")
        for bench in (known[name],) if name in known else stems[name]:
            found[bench.name] = bench
    return list(found.values())
