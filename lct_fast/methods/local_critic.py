"""Local critic training (LCT): arXiv 2102.01963 (and 1805.01128)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lct_fast import ops
from lct_fast.critics import Critic
from lct_fast.methods.method import (
    GroupLike,
    LocalStep,
    Method,
    OptimizerFactory,
    Slot,
    Span,
    accumulate,
    forward,
    joint_step,
    no_span,
)
from lct_fast.methods.objective import Objective


def _paper_adam(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    params = list(params)
    return torch.optim.Adam(params, lr=1e-4, fused=all(p.is_cuda for p in params))


TARGETS = ("next", "last")
_OWN_SHARES = {"l1": 0.0, "one_sided": 0.5, "half_sided": 0.75}


def own_share(loss: str) -> float:
    """w of a critic's loss (1 - w) |L_k - L_{k+1}| + w L_k, as ``LocalCritic`` names it.

    Raises:
        ValueError: no such loss, in one line.
    """
    if loss in _OWN_SHARES:
        return _OWN_SHARES[loss]
    name, _, text = loss.partition(":")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if name != "mixed" or not 0 <= share <= 1:
        raise ValueError(
            f"critic loss: expected {', '.join(_OWN_SHARES)}, or mixed:W with W from 0 to 1, got {loss!r}"
        )
    return share


class LocalCritic(Method):
    """Groups learn from their critic's loss, critics from the distance to the next critic's loss.

    Group k < K takes d mean(L_k) / d h_k; critic k takes the gradient of mean |L_k - L_{k+1}| with L_{k+1}
    held fixed (the cascaded L1 loss of arXiv 2102.01963); the last group takes its own loss.

    Both gradients come from one backward: d|L_k - L_{k+1}|/d phi = s dL_k/d phi with
    s_n = sign(L_k,n - L_{k+1},n), and back-propagation through a critic whose rows are independent is linear
    in each row. So the pass that gives the group's gradient also leaves, in a ``Slot``, each layer's input and
    cotangent; once s is known, each weight gradient is local to its layer. The critic's weights may have
    moved in between: the cotangents were made with those that were in force.

    Args:
        critic_every: update the critics on every n-th update.
        loss: ``"l1"``, the paper's, or one that mixes in a share w of the critic's own cross-entropy,
            (1 - w) |L_k - L_{k+1}| + w L_k: ``"mixed:W"`` with 0 <= W <= 1. It only replaces s by (1 - w) s + w.
            ``"one_sided"`` is w = 0.5, s in {0, 1}, that is max(0, L_k - L_{k+1}); ``"half_sided"`` is w = 0.75, s in
            {0.5, 1}.
        target: ``"next"``, L_{k+1} as in the paper, or ``"last"``: the last group's loss L_K takes its place. For
            lockstep only, as elsewhere feedback goes back over one cut.
        critic_optimizer: factory ``params -> optimizer``; Adam 1e-4 when None, as in the paper.
    """

    name = "local-critic"
    uses_feedback = True
    joint_optimizer = False

    def __init__(
        self,
        critic_every: int = 1,
        loss: str = "l1",
        critic_optimizer: OptimizerFactory | None = None,
        *,
        target: str = "next",
    ) -> None:
        if critic_every < 1:
            raise ValueError(f"critic_every: expected an integer >= 1, got {critic_every}")
        if target not in TARGETS:
            raise ValueError(f"critic target: expected 'next' or 'last', got {target!r}")
        self.critic_every = critic_every
        self.loss = loss
        self.own_share = own_share(loss)
        self.feedback_from_last = target == "last"
        self.critic_optimizer = critic_optimizer or _paper_adam

    def check(self, critics: list[Critic]) -> None:
        for k, critic in enumerate(critics, 1):
            late = {id(p) for _, m in _parametric(critic) for p in m.parameters()}
            late |= {id(p) for p in critic.head.parameters()}
            stray = [name for name, p in critic.named_parameters() if id(p) not in late]
            if stray or not critic.row_independent:
                reason = f"parameters {', '.join(stray)}" if stray else "rows coupled by batch norm"
                raise ValueError(
                    f"local-critic needs critics of convolutions and linear layers, whose rows are independent: "
                    f"critic {k} ({type(critic).__name__}) has {reason}; use conv_fc, depthwise, linear or "
                    f"pooled_linear, or train it with greedy"
                )

    def wants_feedback(self, update: int) -> bool:
        return update % self.critic_every == 0

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
        if group.last:
            return joint_step(group, x, target, objective, scale, span=span)
        critic = group.critic
        with span("forward"):
            h, read, features = forward(group, x)
        if features is None:
            with span("critic"):
                step = objective.of_logits(critic.head, h.detach(), read.detach(), target, scale)
            with span("backward"):
                read.backward(step.du)
            slot = Slot(h.detach(), step.dlogits, step.loss, scale) if keep_slot else None
            return LocalStep(h.detach(), step.loss, slot)
        with span("critic"):
            entry = read.detach().requires_grad_()
            with _recorded(critic) as tape:
                u = features(entry)
            step = objective(critic.head, u.detach(), target, scale, activation=critic.activation)
            names = list(tape) if keep_slot else []
            delta, *cotangents = torch.autograd.grad(u, [entry, *(tape[n][1] for n in names)], step.du)
        with span("backward"):
            read.backward(delta)
        slot = None
        if keep_slot:
            layers = {n: (tape[n][0].detach(), g) for n, g in zip(names, cotangents, strict=True)}
            slot = Slot(u.detach(), step.dlogits, step.loss, scale, layers=layers)
            if step.dlogits is None:
                slot.target = target
        return LocalStep(h.detach(), step.loss, slot)

    def critic_step(self, critic: Critic, slot: Slot, next_loss: Tensor, objective: Objective) -> None:
        difference = slot.loss - next_loss
        sign = (1 - self.own_share) * difference.sign() + self.own_share
        row_scale, activation, head = sign * slot.scale, critic.activation, critic.head
        dbias: Tensor | None
        if slot.dlogits is not None:
            dweight, dbias = ops.critic_head_wgrad(
                slot.u, slot.dlogits, row_scale, activation, dtype=head.weight.dtype
            )
        else:
            assert slot.target is not None
            dweight, dbias = objective.late_weight_gradient(head, slot.u, slot.target, row_scale, activation)
        accumulate(head.weight, dweight)
        accumulate(head.bias, dbias)
        modules = dict(critic.named_modules())
        for name, (x, cotangent) in slot.layers.items():
            g = cotangent * sign.to(cotangent.dtype).view(-1, *[1] * (cotangent.dim() - 1))
            _layer_weight_gradient(modules[name], x, g)


def _parametric(critic: Critic) -> list[tuple[str, nn.Module]]:
    """The layers inside a critic's features whose weight gradient is known from input and cotangent."""
    return [
        (name, m)
        for name, m in critic.named_modules()
        if m is not critic.head and isinstance(m, nn.Conv2d | nn.Linear)
    ]


@contextmanager
def _recorded(critic: Critic) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collects (input, output) of every parametric layer of the critic's features while it runs."""
    tape: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        m.register_forward_hook(lambda _m, args, out, name=name: tape.__setitem__(name, (args[0], out)))
        for name, m in _parametric(critic)
    ]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _layer_weight_gradient(layer: nn.Module, x: Tensor, g: Tensor) -> None:
    """Adds the weight and bias gradient of a layer from its input and the gradient at its output."""
    if isinstance(layer, nn.Linear):
        rows, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        accumulate(layer.weight, rows.t() @ x.to(rows.dtype))
        accumulate(layer.bias, rows.sum(0) if layer.bias is not None else None)
        return
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"no weight gradient rule for {type(layer).__name__}")
    bias = layer.bias is not None
    x = x.to(g.dtype)
    _, dweight, dbias = torch.ops.aten.convolution_backward(
        g,
        x,
        layer.weight.detach().to(g.dtype),
        [layer.out_channels] if bias else None,
        list(layer.stride),
        list(layer.padding),
        list(layer.dilation),
        False,
        [0, 0],
        layer.groups,
        [False, True, bias],
    )
    accumulate(layer.weight, dweight)
    accumulate(layer.bias, dbias if bias else None)
