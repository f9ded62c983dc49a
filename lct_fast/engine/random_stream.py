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
        number = int.from_bytes(digest, "little")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number)
            self._host = torch.get_rng_state()
        # On a device a generator of its own stands in for torch's: CUDA graphs remember the one they were captured
        # with, and move it on with each replay.
        self._generator: torch.Generator | None = None
        if device.type == "cuda":
            self._generator = torch.Generator(device).manual_seed(number)

    @property
    def state(self) -> dict[str, Tensor]:
        """As plain tensors on the host, for checkpoints."""
        state = {"cpu": self._host}
        if self._generator is not None:
            state["cuda"] = self._generator.get_state()
        return state

    @state.setter
    def state(self, state: dict[str, Tensor]) -> None:
        self._host = state["cpu"]
        if self._generator is not None and "cuda" in state:
            self._generator.set_state(state["cuda"])

    def renew(self) -> None:
        """A new generator that goes on where this one is: one whose recording has failed draws no more."""
        if self._generator is not None:
            state = self._generator.get_state()
            self._generator = torch.Generator(self._generator.device)
            self._generator.set_state(state)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Torch's generators continue this stream inside, and are as they were afterwards."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._host)
        try:
            with self._on_device():
                yield
        finally:
            self._host = torch.get_rng_state()
            torch.set_rng_state(outside)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        if self._generator is None:
            yield
            return
        torch.cuda.init()
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        default = torch.cuda.default_generators[index]
        outside = default.graphsafe_get_state()
        default.graphsafe_set_state(self._generator.graphsafe_get_state())
        try:
            yield
        finally:
            default.graphsafe_set_state(outside)
