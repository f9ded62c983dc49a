"""Plain back-propagation, the baseline: the whole network is one group."""

from __future__ import annotations

from torch import Tensor

from lct_fast.methods.method import GroupLike, LocalStep, Method, Span, joint_step, no_span
from lct_fast.methods.objective import Objective


class Backprop(Method):
    """End-to-end back-propagation. The engine joins all groups into one, which learns from its output."""

    name = "backprop"
    uses_critics = False

    def local_step(
        self,
        group: GroupLike,
        x: Tensor,
        target: Tensor,
        objective: Objective,
        scale: Tensor,
        *,
        keep_slot: bool = False,
        span: Span = no_span,
    ) -> LocalStep:
        return joint_step(group, x, target, objective, scale, span=span)
