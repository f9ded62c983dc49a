"""Which implementation of an op runs: the registry, the choice and its errors. Knows no tensor library.

A backend is an implementation of an op: `reference` (plain torch), `cpu`, `triton` or `cuda`. An op lists
the ones it has and, per kind of device, the order of preference; the first that can run is used unless
`use_backend` or the variable LCT_BACKEND names one, which then runs or raises `BackendError`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

NAMES = ("reference", "cpu", "triton", "cuda")
AVAILABLE = "available"


class BackendError(RuntimeError):
    """The backend asked for cannot run here or with these tensors; the message says what would help."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `why_not(device)` is "" when it can run on that kind of device ("cpu", "cuda", or None for any), else
    the reason and what would change it. `dtypes` are the kinds of input it takes, `largest` the largest size
    (what size means is the op's: classes, for a head), `depths` the depths; None for all. At a depth outside
    `best` it comes after the others in the order of preference.
    """

    run: Callable[..., Any]
    why_not: Callable[[str | None], str]
    dtypes: frozenset[Any] | None = None
    largest: int | None = None
    depths: range | None = None
    best: range | None = None


@dataclass
class Op:
    """An op, its backends, and which of them each kind of device prefers."""

    name: str
    backends: Mapping[str, Backend]
    preference: Mapping[str, Sequence[str]]
    _resolved: dict[tuple[str | None, str, Any, int, int], Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _OPS[self.name] = self

    def resolve(self, device: str, dtype: Any, size: int = 0, depth: int = 0) -> Callable[..., Any]:
        """The implementation for inputs of this kind, under the choice in force."""
        key = (_choice, device, dtype, size, depth)
        run = self._resolved.get(key)
        if run is None:
            run = self._resolved[key] = self._resolve(device, dtype, size, depth)
        return run

    def forget(self) -> None:
        """Drop what was resolved: for tests that change what is there."""
        self._resolved.clear()

    def _resolve(self, device: str, dtype: Any, size: int, depth: int) -> Callable[..., Any]:
        if _choice is not None:
            reason = self._why_not(_choice, device, dtype, size, depth)
            if reason:
                raise BackendError(f"{self.name} cannot run on backend '{_choice}': {reason}")
            return self.backends[_choice].run

        def after_the_others(name: str) -> bool:
            best = self.backends[name].best
            return best is not None and depth not in best

        for name in sorted(self.preference.get(device, ()), key=after_the_others):
            if not self._why_not(name, device, dtype, size, depth):
                return self.backends[name].run
        return self.backends["reference"].run

    def _why_not(self, name: str, device: str, dtype: Any, size: int, depth: int) -> str:
        backend = self.backends.get(name)
        if backend is None:
            return f"no such backend for this op, which has {', '.join(self.backends)}"
        if backend.dtypes is not None and dtype not in backend.dtypes:
            taken = ", ".join(sorted(str(d) for d in backend.dtypes))
            return f"it takes {taken} and got {dtype}; cast the input or use backend 'reference'"
        if backend.largest is not None and size > backend.largest:
            return f"it takes a size of up to {backend.largest} and got {size}; use another backend"
        if backend.depths is not None and depth not in backend.depths:
            least, most = backend.depths[0], backend.depths[-1]
            return f"it takes a depth of {least} to {most} and got {depth}; use another backend"
        return backend.why_not(device)


_OPS: dict[str, Op] = {}
_choice: str | None = os.environ.get("LCT_BACKEND") or None


def names() -> list[str]:
    """Every op that `backends` knows."""
    return sorted(_OPS)


def backends(name: str) -> dict[str, str]:
    """For every backend of op `name`: "available", or why it cannot run here and what would change that."""
    op = _OPS.get(name)
    if op is None:
        raise ValueError(f"no op named '{name}'; there are {', '.join(sorted(_OPS))}")
    return {key: backend.why_not(None) or AVAILABLE for key, backend in op.backends.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op on backend `name` ("reference", "cpu", "triton" or "cuda") inside this context.

    Holds for the whole process, every thread, as worker and autograd threads must follow it. An op that
    cannot run there raises `BackendError` when it is called. Put it around a compiled call, not inside.
    """
    global _choice
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got '{name}'")
    before = _choice
    _choice = name
    try:
        yield
    finally:
        _choice = before
