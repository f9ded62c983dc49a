"""A bench of our own making: y = 2 x, by contenders that are right or not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lct_fast.bench.case import OURS, Bench, Case, Contender, Place
from lct_fast.bench.roofline import Roofline
from lct_fast.bench.rule import FINE, Expected, against

ROOF = Roofline(1e9, {torch.float32: 1e9, torch.bfloat16: 1e9})


def outputs(out: Any) -> dict[str, Tensor]:
    return {"y": out}


def contender(name: str, run: Callable[[], Any], **more: Any) -> Contender:
    return Contender(name, run, outputs, **more)


def bench(*contenders: Contender, covers: tuple[str, ...] = ("doubled",)) -> Bench:
    """y = 2 x of [size] ones; 8000 bytes and 1000 operations, whatever the size."""

    def build(place: Place, size: int) -> Case:
        exact = torch.full((size,), 2.0)
        check = against({"y": Expected(exact.double(), exact, FINE)})
        return Case(list(contenders), check, traffic=8000, flops=1000)

    return Bench("doubled", covers, {"size": None}, {"cpu": ("4", "5"), "cuda": ()}, "4", build)


def right(size: int = 4) -> Tensor:
    return torch.full((size,), 2.0)


def ours(run: Callable[[], Any] = right, **more: Any) -> Contender:
    return contender(OURS, run, backend="cpu", slack=1.0, **more)
