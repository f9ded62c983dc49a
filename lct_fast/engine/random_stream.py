"""Random numbers of one group, apart from everyone else's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomStream:
    """The random state that a group's layers draw from (dropout and the like).

    Each group has its own, so it draws the same numbers whichever groups share its process.

    Args:
        seed: of the run; ``torch.initial_seed()`` of the process that made the trainer.
        group: number of the group, from 0.
        device: where the group runs.
        replica: number of the replica, from 0: each draws numbers of its own.
    """

    def __init__(self, seed: int, group: int, device: torch.device, replica: int = 0) -> None:
        self.device = device
        name = f"{seed},{group},{replica}" if replica else f"{seed},{group}"
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest, "little"))
            self.state = self._read()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Torch's generators continue this stream inside, and are as they were afterwards."""
        outside = self._read()
        self._write(self.state)
        try:
            yield
        finally:
            self.state = self._read()
            self._write(outside)

    def _read(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _write(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
