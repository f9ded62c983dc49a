"""What the tests of every op share: where it runs, how large an error may be, memory that faults.

The ladder is: `reference` against autograd in float64, every backend against `reference`, opcheck and
fullgraph compilation, and the same again on a device.
"""

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A backend on a kind of device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def _places() -> tuple[Place, ...]:
    host = (Place("reference", "cpu"), Place("cpu", "cpu"))
    if torch.cuda.is_available():
        return (*host, Place("reference", "cuda"), Place("triton", "cuda"), Place("cuda", "cuda"))
    return (*host, Place("triton", "cpu"))


PLACES = _places()


def assert_rule(name: str, got: Tensor, plain: Tensor, exact: Tensor, eps: float, terms: float = 0.0) -> None:
    """The error rule: max|got - exact| <= 2 max|plain - exact| + eps * max|exact| + 4 * fp32 eps * terms.

    Args:
        name: what is compared, for the message.
        got: the result under test.
        plain: the same from plain torch in the same precision.
        exact: the same in float64.
        eps: of the coarsest format that an operand or the result has.
        terms: the largest sum of absolute terms behind any value of the result. Where they cancel, fp32 sums
            in two orders differ by this, however small the result: rounding n additions in turn costs about
            sqrt(n / 12) eps of it, so 4 covers three levels (block, chunk, fold) of tens of additions each.
    """
    got, plain, exact = (x.detach().cpu().double() for x in (got, plain, exact))
    if got.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}")
    finite = exact.isfinite()
    same_special = (got == exact) | (got.isnan() & exact.isnan())
    if not bool((same_special | finite).all()):
        raise AssertionError(f"{name}: NaN or Inf differ from float64's: {got[~finite]} / {exact[~finite]}")
    if not bool(got[finite].isfinite().all()):
        where = (finite & ~got.isfinite()).nonzero()[:4].tolist()
        raise AssertionError(f"{name}: not finite at {where}, where float64 is")
    if not bool(finite.any()):
        return
    error = _largest(got[finite] - exact[finite])
    plain_error = _largest(plain[finite] - exact[finite])
    size = _largest(exact[finite])
    allowed = 2 * plain_error + eps * size + 4 * torch.finfo(torch.float32).eps * terms
    if not error <= allowed:
        raise AssertionError(
            f"{name}: error {error:.3e} > {allowed:.3e} = 2 x {plain_error:.3e} (plain torch) "
            f"+ {eps:.1e} x {size:.3e} + 4 fp32 eps x {terms:.3e} (terms)"
        )


def assert_same_bits(name: str, a: Tensor, b: Tensor) -> None:
    """Equal bit for bit, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        raise AssertionError(f"{name}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = int((a.contiguous().view(bits) != b.contiguous().view(bits)).sum())
    if differ:
        raise AssertionError(f"{name}: {differ} of {a.numel()} values differ in their bits")


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


class GuardPages:
    """Host tensors flush against a page that may not be touched, so that a stray access faults at once.

    side "after" places the last byte before the forbidden page, "before" the first byte after one. A fault
    ends the process: run what uses this in a subprocess.
    """

    def __init__(self, side: str) -> None:
        if side not in ("before", "after"):
            raise ValueError(f"side must be 'before' or 'after', got '{side}'")
        self._after = side == "after"
        self._libc = ctypes.CDLL(None, use_errno=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, poisoned: all bits set, which is a NaN in every float format."""
        page = mmap.PAGESIZE
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.zeros(tuple(shape), dtype=dtype)
        used = count * torch.empty(0, dtype=dtype).element_size()
        pages = -(-used // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + (pages + 1) * page):
            if self._libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0):
                raise OSError(ctypes.get_errno(), "mprotect failed")
        offset = (pages + 1) * page - used if self._after else page
        flat = torch.frombuffer(memory, dtype=torch.uint8, count=used, offset=offset)
        return flat.fill_(255).view(dtype).view(tuple(shape))

    def copy(self, x: Tensor) -> Tensor:
        """x in guarded memory."""
        return self.empty(x.shape, x.dtype).copy_(x.detach())

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Inside, torch.empty and new_empty on the host give guarded memory: outputs and workspace."""

        def flat(size: tuple[Any, ...]) -> tuple[int, ...]:
            return tuple(size[0]) if size and not isinstance(size[0], int) else size

        def empty(*size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            return self.empty(flat(size), dtype or torch.get_default_dtype())

        def new_empty(like: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            return self.empty(flat(size), dtype or like.dtype)

        def empty_like(like: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            return self.empty(like.shape, dtype or like.dtype)

        with (
            mock.patch.object(torch.Tensor, "new_empty", new_empty),
            mock.patch.object(torch, "empty", empty),
            mock.patch.object(torch, "empty_like", empty_like),
        ):
            yield
