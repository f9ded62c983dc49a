"""Layer-parallel training of residual networks: arXiv 2009.01462."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lct_fast import ops
from lct_fast.methods.auxiliary import AuxiliaryNet
from lct_fast.methods.method import (
    GroupLike,
    LocalStep,
    Method,
    SampleState,
    Slot,
    Span,
    joint_step,
    no_span,
)
from lct_fast.methods.objective import Objective

NAMES = {"penalty": "penalty", "augmented_lagrangian": "augmented-lagrangian"}
# eta * beta from which the step of lambda diverges whatever the network is: see _check_step.
_LIMITS = {"penalty": 2.0, "augmented_lagrangian": 4 / 3}


class LayerParallel(Method):
    """Every group learns from its own stored inputs (arXiv 2009.01462).

    For each training sample lambda_k stands for the input of group k (lambda_1 is the sample itself), x_k for its
    output f_k(lambda_k). The constraint lambda_{k+1} = x_k is replaced by a loss,

        phi(x_K) + sum_k [ beta/2 |lambda_{k+1} - x_k|^2 - <kappa_{k+1}, lambda_{k+1} - x_k> ],

    without kappa the penalty method, with it the augmented Lagrangian. A step of group k, all groups at once:

    1. x_k = f_k(lambda_k), with lambda_k from the sample's previous visit;
    2. p_k = beta (x_k - lambda_{k+1}) + kappa_{k+1}, in the last group d phi / d x_K; the local backward from it;
    3. the optimiser's step, on the sum over features and the mean over the batch;
    4. lambda_{k+1} <- lambda_{k+1} - eta [p at the input of group k+1 + beta (lambda_{k+1} - x_k) - kappa_{k+1}],
       each sample by its own adjoint;
    5. kappa_{k+1} <- kappa_{k+1} - beta (lambda_{k+1} - x_k).

    A sample that was not visited yet gets lambda_{k+1} = x_k: a forward pass. Group k owns lambda_{k+1} and
    kappa_{k+1}: lambda travels forward as the next group's input, the adjoint at that input travels back. So
    ``feedback_delay`` is the number of batches until steps 4 and 5.

    Of the defaults beta = 0.01 and eta = 0.2 / beta come from trials of our own; the paper leaves them open.

    Args:
        kind: "penalty" or "augmented_lagrangian".
        beta: the penalty's weight, above 0. The jump of the penalty method falls as 1 / beta.
        eta: step of lambda; default 0.2 / beta. Stable while eta beta (1 + |J|^2) < 2, with J the derivative of the
            next group, which nobody knows beforehand. Without J, eta beta must be below 2, with multipliers below 4/3;
            that is refused here.
        auxiliary: a small net foretells lambda from the network's input in place of a store, and takes a step towards
            each new lambda (arXiv 2112.05387). So inputs may be augmented. For "penalty" alone.
        auxiliary_warm_up: batches that each such net learns from first, as also after every serial block; until then
            lambda comes from a forward pass.

    Raises:
        ValueError: an argument out of range, in one line.
    """

    uses_feedback = True
    uses_critics = False

    def __init__(
        self,
        kind: str = "penalty",
        beta: float = 0.01,
        eta: float | None = None,
        auxiliary: bool = False,
        auxiliary_warm_up: int = 50,
    ) -> None:
        if kind not in NAMES:
            raise ValueError(f"kind: expected penalty or augmented_lagrangian, got {kind!r}")
        if not 0 < beta < float("inf"):
            raise ValueError(f"beta: expected a positive number, got {beta}")
        eta = 0.2 / beta if eta is None else eta
        if not 0 < eta < float("inf"):
            raise ValueError(f"eta: expected a positive number, got {eta}")
        _check_step(kind, beta, eta)
        if auxiliary and kind != "penalty":
            raise ValueError(
                "auxiliary nets foretell lambda, not multipliers: use them with the penalty method"
            )
        if auxiliary_warm_up < 1:
            raise ValueError(f"auxiliary_warm_up: expected a number of batches >= 1, got {auxiliary_warm_up}")
        self.auxiliary, self.auxiliary_warm_up = auxiliary, auxiliary_warm_up
        self.kind, self.beta, self.eta = kind, beta, eta
        self.name = NAMES[kind]
        self.sample_state = ("lambda",) if kind == "penalty" else ("lambda", "kappa")

    def wants_feedback(self, update: int) -> bool:
        return True

    def auxiliary_net(self, source: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
        return AuxiliaryNet(source, shape)

    def sample_step(
        self,
        group: GroupLike,
        x: Tensor,
        target: Tensor,
        objective: Objective,
        scale: Tensor,
        kept: SampleState | None,
        *,
        answers: bool,
        span: Span = no_span,
    ) -> LocalStep:
        entry = x.detach().requires_grad_(answers)
        if group.last:
            result = joint_step(group, entry, target, objective, scale, span=span)
        else:
            assert kept is not None, "every group but the last keeps a state"
            result = self._consensus_step(group, entry, scale, kept, span)
        if entry.grad is not None:
            # The local loss carries the batch's mean, lambda a sample's own adjoint.
            result.back = entry.grad / scale
        return result

    def _consensus_step(
        self, group: GroupLike, entry: Tensor, scale: Tensor, kept: SampleState, span: Span
    ) -> LocalStep:
        with span("forward"):
            output = group.layers(entry)
        x = output.detach()
        with span("consensus"):
            known = kept.known.view(-1, *[1] * (x.dim() - 1))
            state = {**kept.tensors, "lambda": torch.where(known, kept.tensors["lambda"], x.float())}
            loss, p = ops.consensus_adjoint(x, state["lambda"], state.get("kappa"), self.beta)
        with span("backward"):
            if output.requires_grad:
                output.backward(p * scale)
        return LocalStep(state["lambda"], loss, Slot(x, None, loss, scale, kept=state))

    def late_state(self, slot: Slot, back: Tensor) -> dict[str, Tensor]:
        kept = slot.kept
        following, kappa = ops.consensus_update(
            kept["lambda"], kept.get("kappa"), back.to(slot.u.dtype), slot.u, self.beta, self.eta
        )
        return {"lambda": following} if kappa is None else {"lambda": following, "kappa": kappa}


def _check_step(kind: str, beta: float, eta: float) -> None:
    """With the adjoint held fixed, lambda - x shrinks by 1 - eta beta a step, which must lie above -1; with
    multipliers two numbers evolve together, and stay bounded only below 4/3. A next group with a convex loss makes
    it no more stable."""
    if eta * beta >= _LIMITS[kind]:
        raise ValueError(
            f"eta * beta = {eta * beta:.3g}: {NAMES[kind]} diverges from {_LIMITS[kind]:.3g} on, whatever the network "
            f"is; use eta <= {0.2 / beta:.3g} (0.2 / beta)"
        )
