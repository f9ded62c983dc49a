"""Keeps a group as it is where its loss or gradients are NaN or Inf, without the host waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lct_fast.codecs.late import Late
from lct_fast.engine.errors import NonFiniteError

# A flag is read when this many batches lie behind it.
LATE = 2


@dataclass(slots=True)
class _Report:
    """A flag on its way to the host, and what the host itself had counted before the update of that batch."""

    batch: int
    bad: Late
    before: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)


class Gate:
    """The flags of one group: 0-dim fp32 tensors on its device, 0 or 1.

    From the first bad batch on nothing of the group changes, until the host has read the flag and raised.

    Args:
        group: number of the group, from 0.
        device: where the group runs.
        agreed: of flags, those that any replica of the group has raised; all of them then leave out the same batches.

    Attributes:
        broken: a batch was bad. found: the update that is being prepared must not be (``found_inf`` of torch's fused
            optimisers). critic: the same for the critic's own.
    """

    def __init__(
        self, group: int, device: torch.device, agreed: Callable[[Tensor], Tensor] = lambda flags: flags
    ) -> None:
        self.group, self.agreed = group, agreed
        self.broken, self.found, self.critic = (torch.zeros((), device=device) for _ in range(3))
        self._reports: deque[_Report] = deque()

    def look(self, loss: Tensor, gradients: Sequence[Tensor], refused: Tensor | None) -> Tensor:
        """Flags a batch and returns its own flag: whether it must leave no trace.

        Args:
            loss: per sample. gradients: of the batch, or of an accumulation so far.
            refused: 1 where the batch was refused before it came here, which is somebody else's to report.
        """
        bad = ~torch.isfinite(loss).all()
        if gradients:
            bad = bad | ~torch.isfinite(torch.nn.utils.get_total_norm(gradients, float("inf")))
        bad, refused = self.agreed(
            torch.stack([bad.float(), torch.zeros_like(self.broken) if refused is None else refused])
        ).unbind()
        self.broken.copy_(torch.maximum(self.broken, bad * (1 - refused)))
        now = torch.maximum(torch.maximum(bad, refused), self.broken)
        self.found.copy_(torch.maximum(self.found, now))
        return now

    def hear(self, losses: Iterable[Tensor]) -> None:
        """The critic's next update learns from these."""
        bad = self.agreed(torch.stack([~torch.isfinite(loss).all() for loss in losses]).any().float())
        self.critic.copy_(torch.maximum(torch.maximum(self.critic, bad), self.broken))

    def step(self, optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
        """``optimizer.step()``, but nothing changes where ``flag`` is 1; and lowers the flag if the group is sound."""
        if self._reports:
            self._reports[-1].before += _on_the_host(optimizer, flag.device)
        before = _tensors(optimizer, flag.device)
        if _takes_found_inf(optimizer):
            optimizer.found_inf = flag  # type: ignore[attr-defined]
            try:
                optimizer.step()
            finally:
                del optimizer.found_inf  # type: ignore[attr-defined]
            changed = {k: t for k, t in _tensors(optimizer, flag.device).items() if k not in before}
            kept: dict[Any, Tensor] = {}
        else:
            kept = {k: t.clone() for k, t in before.items()}
            optimizer.step()
            changed = _tensors(optimizer, flag.device)
        for key, tensor in changed.items():
            # State that a skipped first step has made: zero is as good as none.
            restore(tensor, kept.get(key), flag)
        flag.copy_(self.broken)

    def report(self, batch: int) -> None:
        """Sends the flag, as it is behind ``batch``, to the host."""
        self._reports.append(_Report(batch, Late(self.broken.clone())))

    def check(self, late: int = LATE) -> None:
        """Reads the flags that have ``late - 1`` or more behind them.

        Raises:
            NonFiniteError: names the group and the first bad batch. The group is as it was before that batch.
        """
        while self._reports and len(self._reports) >= late:
            report = self._reports.popleft()
            if report.bad.value():
                for each in reversed([report, *self._reports]):
                    for state, name, value in each.before:
                        state[name] = value
                self._reports.clear()
                for flag in (self.broken, self.found, self.critic):
                    flag.zero_()
                raise NonFiniteError(
                    f"the loss or a gradient of group {self.group + 1} at batch {report.batch} is NaN or Inf: "
                    f"the group was not updated by it, nor since; lower its learning rate and go on from the last "
                    f"checkpoint"
                )


def restore(tensor: Tensor, before: Tensor | None, flag: Tensor) -> None:
    """``tensor`` becomes what it was ``before``, by default zero, where ``flag`` is 1."""
    old = torch.zeros_like(tensor) if before is None else before
    with torch.no_grad():
        tensor.copy_(torch.where(flag > 0, old, tensor))


def _takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it skips its step by ``found_inf``, as torch's fused ones do for GradScaler."""
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _tensors(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[Any, Tensor]:
    """Parameters and state on ``device``, by name."""
    found: dict[Any, Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            found[id(p), ""] = p
            state = optimizer.state.get(p, {})
            found |= {(id(p), n): t for n, t in state.items() if isinstance(t, Tensor) and t.device == device}
    return found


def _on_the_host(
    optimizer: torch.optim.Optimizer, device: torch.device
) -> list[tuple[dict[str, Any], str, Any]]:
    """What an optimiser counts on the host, such as Adam's steps when it is neither fused nor capturable."""
    found: list[tuple[dict[str, Any], str, Any]] = []
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, int | float):
                found.append((state, name, value))
            elif isinstance(value, Tensor) and value.device != device:
                found.append((state, name, value.clone()))
    return found
