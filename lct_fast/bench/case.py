"""What is measured: a bench has shapes, a shape makes a case, a case has contenders that do the same job."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lct_fast import ops
from lct_fast.bench.rule import Check

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# The definition, `reference`, is plain torch; it is measured only where it is asked for.
KERNELS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
OURS = "lct_fast"

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to do the job of a case.

    run: does it once. outputs: what is compared with float64, by name, from what `run` returns. backend: of ours;
    empty for a rival. slack: see `rule.judge`. reset: brings back what `run` changes in place, before every sample
    and untimed. graphs: False where it is known that no CUDA graph captures it. in_torch: False where its memory is
    not torch's to count. package: whose it is, empty for ours and torch's; what another package refuses is skipped.
    """

    name: str
    run: Callable[[], Any]
    outputs: Callable[[Any], Outputs]
    backend: str = ""
    slack: float = 32.0
    reset: Callable[[], None] | None = None
    graphs: bool = True
    in_torch: bool = True
    package: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.backend}".strip()


@dataclass(frozen=True)
class Case:
    """Contenders over the same tensors.

    traffic: bytes that have to be read and written at the least. flops: operations, in the arithmetic of
    `arithmetic`, whose rate is measured by a matrix product.
    """

    contenders: list[Contender]
    check: Check
    traffic: int
    flops: int
    arithmetic: torch.dtype = torch.float32


@dataclass(frozen=True)
class Place:
    """Where to measure: device "cpu" or "cuda", backends of ours (none: every kernel), rivals beyond torch.

    against: parts of names; only rivals that have one of them take part (none: all). compiled: with torch.compile
    among the rivals.
    """

    device: str = "cpu"
    backends: tuple[str, ...] = ()
    rivals: bool = False
    against: tuple[str, ...] = ()
    compiled: bool = True

    def running(self, *names: str) -> list[str]:
        """The backends that run all these ops here. Raises ValueError, with the reasons, where there is none."""
        found, reasons = [], []
        for backend in self.backends or KERNELS[self.device]:
            reason = next(filter(None, (self._why_not(name, backend) for name in names)), "")
            if reason:
                reasons.append(f"{backend}: {reason}")
            else:
                found.append(backend)
        if not found:
            raise ValueError(
                f"no backend of {names[0]} can be measured on {self.device}: {'; '.join(reasons)}"
            )
        return found

    def _why_not(self, name: str, backend: str) -> str:
        if backend not in ("reference", *KERNELS[self.device]):
            return f"it is not measured on {self.device}"
        state = ops.backends(name).get(backend, f"{name} has no such backend")
        return "" if state == "available" else state


@dataclass(frozen=True)
class Bench:
    """A benchmark of one or more ops.

    name: as the command line has it. covers: the ops, as `lct.ops.names()` has them. form: the fields of a shape in
    order, each with the words it may be, or None for a number. shapes: by device, what tells most first. tiny: a
    shape for a trial of the code. rivals: modules of other packages, by device. build: a case from a place and
    the fields.
    """

    name: str
    covers: tuple[str, ...]
    form: Mapping[str, Collection[str] | None]
    shapes: Mapping[str, tuple[str, ...]]
    tiny: str
    build: Callable[..., Case]
    rivals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def parse(self, shape: str) -> dict[str, int | str]:
        """The fields of a shape, as in "65536,128,10,f32". Raises ValueError with the form that is expected."""
        parts = shape.split(",")
        fields: dict[str, int | str] = {}
        try:
            for (name, words), part in zip(self.form.items(), parts, strict=True):
                fields[name] = part if words else int(part)
                if part not in words if words else int(part) < 1:
                    raise ValueError
        except ValueError:
            expected = ",".join("|".join(words) if words else name for name, words in self.form.items())
            raise ValueError(f"a shape of {self.name} is {expected}, got '{shape}'") from None
        return fields

    def case(self, shape: str, place: Place) -> Case:
        """The case of a shape. Raises ValueError where the shape does not fit or no backend of ours can run."""
        case = self.build(place, **self.parse(shape))
        if not place.against:
            return case
        kept = [c for c in case.contenders if c.name == OURS or any(part in c.name for part in place.against)]
        if all(c.name == OURS for c in kept):
            names = ", ".join(sorted({c.name for c in case.contenders} - {OURS}))
            raise ValueError(
                f"no rival of {self.name} is called {' or '.join(place.against)}; there are {names}"
            )
        return replace(case, contenders=kept)


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    """Float32 normal numbers on the generator's device."""
    return torch.randn(*shape, generator=draw, device=draw.device)


def generator(place: Place) -> torch.Generator:
    """The same numbers for every run."""
    return torch.Generator(place.device).manual_seed(0)


def ours(
    place: Place,
    names: tuple[str, ...],
    run: Callable[[], Any],
    outputs: Callable[[Any], Outputs],
    reset: Callable[[], None] | None = None,
) -> Iterator[Contender]:
    """`run` on every backend that has all the ops `names`."""

    def on(backend: str) -> Callable[[], Any]:
        def call() -> Any:
            with ops.use_backend(backend):
                return run()

        return call

    for backend in place.running(*names):
        yield Contender(OURS, on(backend), outputs, backend, slack=1.0, reset=reset)


def plain_torch(
    place: Place,
    function: Callable[..., Any],
    step: Callable[[Callable[..., Any]], Callable[[], Any]],
    outputs: Callable[[Any], Outputs],
    slack: float = 32.0,
    reset: Callable[[], None] | None = None,
    compiled: Callable[..., Any] | None = None,
) -> Iterator[Contender]:
    """`step(function)` as it is, and with the function compiled; on the CPU with either of two settings.

    compiled: what to compile instead, where the fastest way without a compiler is not the fastest with one.
    """
    yield Contender("torch eager", step(function), outputs, slack=slack, reset=reset)
    if not place.compiled:
        return
    modes = ("max-autotune-no-cudagraphs",) if place.device == "cuda" else ("", "max-autotune-no-cudagraphs")
    for mode in modes:
        fast = torch.compile(compiled or function, dynamic=False, mode=mode or None)
        yield Contender(f"torch.compile {mode}".strip(), step(fast), outputs, slack=slack, reset=reset)
