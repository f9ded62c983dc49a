"""Decoupled greedy learning (DGL), synchronous form: arXiv 2106.06401 (and 1901.08164)."""

from __future__ import annotations

from torch import Tensor

from lct_fast.methods.method import GroupLike, LocalStep, Method, Span, joint_step, no_span
from lct_fast.methods.objective import Objective


class Greedy(Method):
    """Each group and its auxiliary head learn together from the head's own cross-entropy (arXiv 2106.06401).

    Group and head share one optimiser and one backward; h_k leaves before the update. Nothing travels back.
    """

    name = "greedy"

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
