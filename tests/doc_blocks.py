"""The Python blocks of the pages: found, given what a page takes for granted, run.

A fence says ``python``, or ``python torchrun=N`` for a program that torchrun starts in N processes. Blocks of the first
kind share one namespace a page. Run as a program, this is one process of the second kind: ``doc_blocks.py PAGE INDEX``.
"""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lct_fast as lct

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]

_FENCE = re.compile(r"^```python(?: torchrun=(\d+))?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """``processes`` is 0 where the block runs in the test itself; ``line`` is that of its first line in the page."""

    page: str
    line: int
    source: str
    processes: int

    def run(self, names: dict[str, Any]) -> None:
        # As many empty lines before it as in the page: a traceback then names the page's line.
        exec(
            compile("\n" * (self.line - 1) + self.source, str(ROOT / self.page), "exec", dont_inherit=True),
            names,
        )


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    assert text.count("```python") == len(_FENCE.findall(text)), (
        f"{page}: a fence nobody closes, or an option"
    )
    return [
        Block(page, text.count("\n", 0, m.start(2)) + 1, m[2], int(m[1] or 0)) for m in _FENCE.finditer(text)
    ]


def taken_for_granted() -> dict[str, Any]:
    """The names that docs/README.md says are the reader's own."""
    torch.manual_seed(0)

    def layer(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    model = nn.Sequential(OrderedDict(layer1=layer(3), layer2=layer(8), layer3=layer(8)))
    model.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    model.add_module("head", nn.Linear(32, 10))
    loader = [(torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))) for _ in range(4)]
    x, y = loader[0]
    groups = lct.split(model, example_input=x, split_points=["layer2", "layer3"])
    return {
        **{"torch": torch, "lct": lct, "model": model, "groups": groups},
        **{"x": x, "y": y, "loader": loader, "test_batches": loader[:2]},
    }


if __name__ == "__main__":
    page, index = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    blocks(page)[index].run(taken_for_granted() | {"__name__": "__main__"})
