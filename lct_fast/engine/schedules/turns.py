"""Whose turn it is in a simulated asynchronous run."""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

import torch

# Turns that a warm start gives each group.
WARM_UP = 2


class Turns:
    """Draws the group that works next, from a seeded generator of its own (arXiv 2106.06401).

    Group k is drawn with probability w_k / sum_j w_j; the slow group has w = 1 / S, every other one w = 1. A warm start
    gives every group two turns, in order, before the next draw.

    Args:
        groups: number of groups.
        slow: index of the slow group, from 0, or None.
        slow_down: S, how many times as seldom it is drawn as another group.
        seed: of the run.
    """

    def __init__(self, groups: int, slow: int | None, slow_down: float, seed: int) -> None:
        self.weights = torch.ones(groups, dtype=torch.float64)
        if slow is not None:
            self.weights[slow] = 1 / slow_down
        digest = hashlib.blake2b(f"{seed},turns".encode(), digest_size=4).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        self.warming: deque[int] = deque()
        self.warm_up()

    def warm_up(self) -> None:
        """A warm start from here."""
        self.warming = deque(k for k in range(len(self.weights)) for _ in range(WARM_UP))

    def next(self) -> int:
        """Index of the group whose turn it is."""
        if self.warming:
            return self.warming.popleft()
        return int(torch.multinomial(self.weights, 1, generator=self.generator))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain data."""
        return {"generator": self.generator.get_state(), "warming": list(self.warming)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what ``state`` gave."""
        self.generator.set_state(state["generator"])
        self.warming = deque(state["warming"])
