"""State that layers carry from one batch to the next, as a recurrent layer does over the windows of a text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Carrying(Protocol):
    """A layer with such state.

    In training mode it goes on from ``carried``, a buffer that is not part of its ``state_dict`` (checkpoints keep it
    apart, as its shape is the batch's). In evaluation mode every call begins afresh, unless ``go_on`` was called: then
    calls follow on each other, apart from ``carried``.
    """

    carried: Tensor

    def begin_sequence(self) -> None:
        """The next batch in training mode begins afresh."""

    def go_on(self, evaluating: bool) -> None:
        """From the next call in evaluation mode on, calls follow on each other, or do not any more."""


def layers(module: nn.Module) -> dict[str, Carrying]:
    """The layers inside ``module`` that carry state, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Carrying)}


def begin_sequence(modules: Iterable[nn.Module]) -> None:
    """The next batch in training mode begins afresh, in all layers that carry state."""
    for module in modules:
        for layer in layers(module).values():
            layer.begin_sequence()


def go_on(modules: Iterable[nn.Module], evaluating: bool) -> None:
    """Lets batches in evaluation mode follow on each other, the next one first; or ends that."""
    for module in modules:
        for layer in layers(module).values():
            layer.go_on(evaluating)
