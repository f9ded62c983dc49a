"""A recurrent layer whose state goes on from window to window: back-propagation through time, truncated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_KINDS: dict[str, tuple[type[nn.LSTM] | type[nn.GRU], int]] = {"lstm": (nn.LSTM, 2), "gru": (nn.GRU, 1)}


class RecurrentLayer(nn.Module):
    """One LSTM or GRU layer, [N, T, features] -> [N, T, hidden]; row n goes on where row n of the last window ended.

    Gradients stay within a window. Row n of a batch must continue row n of the one before it, until
    ``begin_sequence``. What is carried is kept in fp32.

    Args:
        kind: "lstm" (state h and c) or "gru" (h).
        features, hidden: size of the input and of the state.

    Attributes:
        carried: the state behind the last window of training, [2 or 1, N, hidden]; N = 0 before the first.
    """

    carried: Tensor

    def __init__(self, kind: str, features: int, hidden: int) -> None:
        super().__init__()
        make, self.parts = _KINDS[kind]
        self.rnn = make(features, hidden, batch_first=True)
        self.register_buffer("carried", torch.zeros(self.parts, 0, hidden), persistent=False)
        # Of an evaluation: None where calls do not follow on each other.
        self._evaluated: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy's weights lie apart, of which cuDNN warns at each call; does nothing on the CPU.
        self.rnn.flatten_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, features] -> [N, T, hidden].

        Raises:
            ValueError: in training, another N than the window before had.
        """
        if self.training:
            begin = self._go_on_from(self.carried, x)
            y, end = self._run(x, begin)
            if self.carried.shape != end.shape:
                self.carried = torch.zeros_like(end, dtype=self.carried.dtype)
            self.carried.copy_(end)
            return y
        if self._evaluated is None:
            return self._run(x, self._zeros(x))[0]
        # The last windows of an evaluation may have fewer rows: those go on.
        rows = self._evaluated[:, : len(x)]
        y, self._evaluated = self._run(x, self._go_on_from(rows, x))
        return y

    def begin_sequence(self) -> None:
        """The next window of training begins afresh, with any number of rows."""
        self.carried = self.carried.new_zeros(self.parts, 0, self.rnn.hidden_size)

    def go_on(self, evaluating: bool) -> None:
        """Windows in evaluation mode follow on each other from here on, or each begins afresh again."""
        self._evaluated = self.carried.new_zeros(self.parts, 0, self.rnn.hidden_size) if evaluating else None

    def _go_on_from(self, state: Tensor, x: Tensor) -> Tensor:
        if state.shape[1] == 0:
            return self._zeros(x)
        if state.shape[1] != len(x):
            raise ValueError(
                f"a recurrent layer goes on from a window of {state.shape[1]} rows, got {len(x)}: give as many, or "
                f"begin anew with trainer.begin_sequence()"
            )
        # The state is written over before the backward pass reads it.
        return state.clone()

    def _zeros(self, x: Tensor) -> Tensor:
        return self.carried.new_zeros(self.parts, x.shape[0], self.rnn.hidden_size)

    def _run(self, x: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
        if self.parts == 1:
            y, end = self.rnn(x, begin)
            return y, end.detach()
        y, (h, c) = self.rnn(x, (begin[:1], begin[1:]))
        return y, torch.cat([h, c]).detach()
