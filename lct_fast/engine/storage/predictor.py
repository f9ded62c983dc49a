"""A net in place of what a group would keep for every sample: it foretells that from the network's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lct_fast.methods import Method, SampleState


class Predictor:
    """Has the calls of a ``SampleStore``, with batches of the network's input in place of samples' numbers.

    Args:
        method: makes the net and says what it learns from.
        source, shape: of the network's input and of what is foretold, without the batch.
        device: where the group runs.
        seed: of the net's weights.

    Attributes:
        era: how often what it foretells was given up.
    """

    what = "auxiliary nets"

    def __init__(
        self, method: Method, source: tuple[int, ...], shape: tuple[int, ...], device: torch.device, seed: int
    ) -> None:
        self.method, self.shape, self.device = method, shape, device
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.net = method.auxiliary_net(source, shape).to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), method.auxiliary_rate)
        self.learned, self.era = 0, 0

    @torch.no_grad()
    def read(self, x: Tensor) -> SampleState:
        """What is foretold for a batch [N, ...]; nothing is known until the net has learned from enough of them."""
        x = x.to(self.device)
        known = torch.full((len(x),), self.learned >= self.method.auxiliary_warm_up, device=self.device)
        (name,) = self.method.sample_state
        return SampleState(known, {name: self.net(x).float()})

    def write(self, x: Tensor, tensors: dict[str, Tensor]) -> None:
        """One step of the net towards these tensors [N, ...]."""
        (wanted,) = tensors.values()
        self.optimizer.zero_grad()
        torch.nn.functional.mse_loss(self.net(x.to(self.device)), wanted).backward()
        self.optimizer.step()
        self.learned += 1

    def forget(self) -> None:
        """What the net foretells belongs to other weights: nothing is known until it has learned anew."""
        self.learned = 0
        self.era += 1

    @property
    def nbytes(self) -> int:
        """Bytes of the net's parameters."""
        return sum(p.nbytes for p in self.net.parameters())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: tensors and plain data."""
        return {
            "net": dict(self.net.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "learned": self.learned,
            "era": self.era,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what ``state`` gave."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.learned, self.era = state["learned"], state["era"]
