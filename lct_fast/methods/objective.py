"""What a head learns from: a per-sample loss and its gradients at the head's input and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lct_fast import ops
from lct_fast.ops.linear_cross_entropy import LARGE

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(slots=True)
class HeadStep:
    """Loss [N] (fp32), dlogits [N, V] (never scaled), du [N, D] (scaled), and the head's gradients if asked for.

    With a vocabulary of classes there are no dlogits; and the loss of every row is the mean where rows were not asked
    for.
    """

    loss: Tensor
    dlogits: Tensor | None
    du: Tensor
    dweight: Tensor | None
    dbias: Tensor | None


class Objective:
    """Per-sample loss of logits against targets.

    Cross-entropy with integer labels runs through the fused ``critic_head`` op, and with 32,768 classes or more through
    ``linear_cross_entropy``. Soft labels (float targets [N, V]) and a loss of the user's own run through torch.

    Args:
        loss: ``loss(logits [N, V] fp32, target) -> [N]``, without a reduction; None for cross-entropy.
        ignore_index: integer label whose rows carry no loss and no gradient.
    """

    def __init__(self, loss: LossFunction | None = None, ignore_index: int = -100) -> None:
        self.loss = loss
        self.ignore_index = ignore_index

    def scale(self, target: Tensor, divisor: int = 1) -> Tensor:
        """1 / (rows that count * divisor), a 0-dim fp32 tensor on the target's device."""
        return 1.0 / (self.counted(target).clamp(min=1) * divisor).float()

    def counted(self, target: Tensor) -> Tensor:
        """Rows of ``target`` that carry a loss: a 0-dim int64 tensor on its device."""
        if target.is_floating_point():
            return torch.full((), len(target), dtype=torch.int64, device=target.device)
        return (target != self.ignore_index).sum()

    def rows(self, target: Tensor) -> int:
        """Rows of ``target``: its samples, or where each has tokens with labels of their own, all of these."""
        return len(target) if target.is_floating_point() else target.numel()

    def __call__(
        self,
        head: nn.Linear | None,
        u: Tensor,
        target: Tensor,
        scale: Tensor,
        *,
        activation: str = "none",
        with_weight_gradient: bool = False,
        each_row: bool = True,
    ) -> HeadStep:
        """Loss and gradients at ``u`` [N, D], the head's pre-activation input (detached by the caller).

        Where samples have tokens, rows are all tokens of all samples and integer targets may come as [samples, tokens].
        ``scale`` is the factor of the mean; it reaches ``du``, ``dweight`` and ``dbias`` but not ``dlogits``. Without
        ``each_row`` the loss need only be right on average.
        """
        target = _flat(target, u)
        if head is not None and self.loss is None and not target.is_floating_point():
            if head.out_features >= LARGE:
                return self._of_a_vocabulary(
                    head, u, target, scale, activation, with_weight_gradient, each_row
                )
            row_scale = scale.expand(len(u)).contiguous() if with_weight_gradient else None
            r = ops.critic_head(
                u,
                head.weight.detach(),
                None if head.bias is None else head.bias.detach(),
                target,
                scale,
                row_scale,
                activation,
                self.ignore_index,
            )
            return HeadStep(r.loss, r.dlogits, r.dh, r.dweight, r.dbias if head.bias is not None else None)
        return self._in_torch(head, u, target, scale, activation, with_weight_gradient)

    def of_logits(
        self,
        head: nn.Linear,
        h: Tensor,
        logits: Tensor,
        target: Tensor,
        scale: Tensor,
        with_weight_gradient: bool = False,
    ) -> HeadStep:
        """As a call on ``h`` [N, D], given the head's logits [N, V] of it; ``du`` is the gradient at the logits."""
        loss, dlogits = self._at_logits(logits, target)
        dweight = dbias = None
        if with_weight_gradient:
            row_scale = scale.expand(len(h)).contiguous()
            dweight, dbias = ops.critic_head_wgrad(h, dlogits.to(h.dtype), row_scale, dtype=head.weight.dtype)
        return HeadStep(
            loss,
            dlogits.to(h.dtype),
            (dlogits * scale).to(logits.dtype),
            dweight,
            dbias if head.bias is not None else None,
        )

    def _at_logits(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [N] and its gradient at the logits, in fp32 (fp64 for fp64)."""
        wide = logits.float() if logits.dtype != torch.float64 else logits
        with torch.enable_grad():
            wide = wide.detach().requires_grad_()
            loss = self.per_sample(wide, target)
            (dlogits,) = torch.autograd.grad(loss.sum(), wide)
        # Soft labels in float64 make it wider than the logits.
        return loss.detach().to(wide.dtype), dlogits

    def late_weight_gradient(
        self, head: nn.Linear, u: Tensor, target: Tensor, row_scale: Tensor, activation: str
    ) -> tuple[Tensor, Tensor | None]:
        """As ``critic_head_wgrad`` for a vocabulary of classes: made again from ``u``, by the head as it is now."""
        parameters = [p.detach().requires_grad_() for p in head.parameters()]
        target = _flat(target, u)
        with torch.enable_grad():
            loss = self._vocabulary_loss(u, parameters, target, activation, "none")
            dweight, *dbias = torch.autograd.grad(loss, parameters, row_scale.to(loss.dtype))
        return dweight, dbias[0] if dbias else None

    def _of_a_vocabulary(
        self,
        head: nn.Linear,
        u: Tensor,
        target: Tensor,
        scale: Tensor,
        activation: str,
        weights: bool,
        each_row: bool,
    ) -> HeadStep:
        u = u.detach().requires_grad_()
        parameters = [p.detach().requires_grad_(weights) for p in head.parameters()]
        inputs = [u, *(parameters if weights else [])]
        with torch.enable_grad():
            loss = self._vocabulary_loss(u, parameters, target, activation, "none" if each_row else "sum")
            du, *rest = torch.autograd.grad(loss, inputs, scale.to(loss.dtype).expand_as(loss))
        dweight, dbias = (*rest, None, None)[:2]
        loss = loss.detach().float()
        return HeadStep(loss if each_row else (loss / len(u)).expand(len(u)), None, du, dweight, dbias)

    def _vocabulary_loss(
        self, u: Tensor, parameters: list[Tensor], target: Tensor, activation: str, reduction: str
    ) -> Tensor:
        weight, *bias = parameters
        a = u.relu() if activation == "relu" else u
        return ops.linear_cross_entropy(
            a, weight, bias[0] if bias else None, target, self.ignore_index, reduction
        )

    def per_sample(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss [N] of logits [N, V], differentiable; of logits [N, T, V] and integer targets [N, T], [N * T]."""
        logits, target = flat(logits, target)
        if self.loss is None:
            return F.cross_entropy(logits, target, reduction="none", ignore_index=self.ignore_index)
        loss = self.loss(logits, target)
        if loss.shape != logits.shape[:1]:
            raise ValueError(
                f"the loss must return one value a sample: expected shape {tuple(logits.shape[:1])}, got "
                f"{tuple(loss.shape)}; use reduction='none'"
            )
        return loss

    def _in_torch(
        self, head: nn.Linear | None, u: Tensor, target: Tensor, scale: Tensor, activation: str, weights: bool
    ) -> HeadStep:
        a = u.relu() if activation == "relu" else u
        with torch.no_grad():
            logits = (
                a
                if head is None
                else F.linear(
                    a, head.weight.to(a.dtype), None if head.bias is None else head.bias.to(a.dtype)
                )
            )
        loss, dlogits = self._at_logits(logits, target)
        dweight = dbias = None
        du = dlogits * scale
        if head is not None:
            if weights:
                dweight = (du.t() @ a.to(du.dtype)).to(head.weight.dtype)
                dbias = None if head.bias is None else du.sum(0).to(head.bias.dtype)
            du = du @ head.weight.detach().to(du.dtype)
        if activation == "relu":
            du = du * (u > 0)
        return HeadStep(loss, dlogits, du.to(u.dtype), dweight, dbias)


def flat(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [R, V] and labels [R] of all tokens, given those of samples [N, T, V] and [N, T]; others as they are."""
    tokens = not target.is_floating_point() and target.dim() > 1 and logits.shape[:-1] == target.shape
    return (logits.flatten(0, -2), target.flatten()) if tokens else (logits, _flat(target, logits))


def _flat(target: Tensor, u: Tensor) -> Tensor:
    """Integer labels of tokens as the rows of ``u``, if that is what they are."""
    tokens = not target.is_floating_point() and target.dim() > 1 and u.dim() == 2 and target.numel() == len(u)
    return target.flatten() if tokens else target
