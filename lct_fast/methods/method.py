"""The interface of a method: what one group does with one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lct_fast.critics import Critic
from lct_fast.methods.objective import Objective

Span = Callable[[str], AbstractContextManager[Any]]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def no_span(name: str) -> AbstractContextManager[Any]:
    return nullcontext()


class Fused(Protocol):
    """Layers that give their output and its average pool, or the head's logits, in shared passes."""

    gives_logits: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


class GroupLike(Protocol):
    """What a method sees of a group: layers, the head on its output, and whether it is the last.

    ``fused`` gives the layers' output and what the head begins with in shared passes; None where there is nothing to
    share.
    """

    @property
    def layers(self) -> Callable[[Tensor], Tensor]: ...

    @property
    def critic(self) -> Critic: ...

    @property
    def fused(self) -> Fused | None: ...

    @property
    def last(self) -> bool: ...


@dataclass(slots=True)
class Slot:
    """What the late weight gradient of a critic needs, frozen when the batch passed.

    Where the head has a vocabulary of classes ``target`` [N] stands in place of ``dlogits``. ``layers`` maps the name
    of each parametric layer in the critic's features to (input, cotangent at its output); the cotangents carry
    ``scale``. Of a method that keeps a ``sample_state``, ``kept`` is what it was when the batch passed, and the engine
    notes whose it was: ``samples`` [N], and the ``era`` of the store.
    """

    u: Tensor
    dlogits: Tensor | None
    loss: Tensor
    scale: Tensor
    target: Tensor | None = None
    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    samples: Tensor | None = None
    era: int = 0


@dataclass(slots=True)
class LocalStep:
    """Result of one local step: h_k (detached), loss [N] of the head on it, and the slot for late feedback.

    ``back`` is what the group before gets, where that is not the loss.
    """

    h: Tensor
    loss: Tensor
    slot: Slot | None = None
    back: Tensor | None = None

    @property
    def feedback(self) -> Tensor:
        """What travels back over the cut before the group."""
        return self.loss if self.back is None else self.back


@dataclass(slots=True)
class SampleState:
    """What a group keeps for the samples of a batch: tensors [N, ...] fp32 by name, and ``known`` [N], bool.

    A sample that was not seen yet, or whose state was given up, has zeros.
    """

    known: Tensor
    tensors: dict[str, Tensor]


class Method:
    """One way for groups to learn. A method leaves gradients in ``.grad``; the engine clips and updates."""

    name: str
    # The next group's per-sample loss, or what its steps name ``back``, travels back over each cut.
    uses_feedback = False
    # What travels is the last group's loss instead; in lockstep only.
    feedback_from_last = False
    # Every group but the last has a head of its own; without, only the last exit exists.
    uses_critics = True
    # The engine joins all groups into one.
    joins_groups = False
    # Names of what every group but the last keeps for each training sample, in the shape of its output; where there
    # are any, the engine calls ``sample_step`` and ``late_state`` in place of ``local_step`` and ``critic_step``.
    sample_state: tuple[str, ...] = ()
    # A net foretells that from the network's input in place of a store, once it has learned from ``auxiliary_warm_up``
    # batches; the rate is its Adam's.
    auxiliary = False
    auxiliary_warm_up = 0
    auxiliary_rate = 1e-3
    # The critic's parameters belong to the group's optimiser.
    joint_optimizer = True
    # A group's step asks for the network's loss of outputs of its own making, ``behind(h_k [M, ...], target) -> [M]``
    # of the group it is given, so groups run in lockstep.
    asks_behind = False
    # Factory of the optimiser of each critic; only read when joint_optimizer is False.
    critic_optimizer: OptimizerFactory | None = None

    def check(self, critics: list[Critic]) -> None:
        """Refuse critics that this method cannot train."""

    def prepare(self, layers: nn.Module, head: nn.Module | None) -> None:
        """Before a group's optimiser is made: refuse layers that cannot learn this way, add what else learns.

        Args:
            layers: the group's. head: the end of the network, of the last group; else None.
        """

    def wants_feedback(self, update: int) -> bool:
        """Whether the critics learn from the batches of this update."""
        return False

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
        """Forward, local loss, local backward of one group on one batch; no gradient leaves the group.

        Unless a method says otherwise, layers and head learn together from the head's own loss.
        """
        return joint_step(group, x, target, objective, scale, span=span, each_row=self.uses_feedback)

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
        """As ``local_step``, given what the group keeps for these samples; None in the last group.

        ``answers``: whether there is a group before, which gets ``back``.
        """
        raise TypeError(f"{type(self).__name__} keeps nothing for samples")

    def auxiliary_net(self, source: tuple[int, ...], shape: tuple[int, ...]) -> nn.Module:
        """A net from the network's input to what is kept for a sample; shapes are without the batch."""
        raise TypeError(f"{type(self).__name__} has no auxiliary nets")

    def late_state(self, slot: Slot, back: Tensor) -> dict[str, Tensor]:
        """What is kept for the slot's samples from now on, by name, given what came back from the next group."""
        raise TypeError(f"{type(self).__name__} keeps nothing for samples")

    def critic_step(self, critic: Critic, slot: Slot, next_loss: Tensor, objective: Objective) -> None:
        """Add the critic's gradients, now that the next group's loss [N] on the same batch is known."""
        raise TypeError(f"{type(self).__name__} takes no feedback")


def accumulate(parameter: Tensor | None, gradient: Tensor | None) -> None:
    """parameter.grad += gradient."""
    if parameter is None or gradient is None or not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def forward(group: GroupLike, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor] | None]:
    """h_k, what the critic reads of it, and its features as a function of that; None if that is its logits."""
    fused = group.fused
    if fused is None:
        h = group.layers(x)
        return h, h, group.critic.features
    h, read = fused(x)
    return h, read, None if fused.gives_logits else group.critic.from_pooled


def joint_step(
    group: GroupLike,
    x: Tensor,
    target: Tensor,
    objective: Objective,
    scale: Tensor,
    *,
    span: Span = no_span,
    each_row: bool = True,
) -> LocalStep:
    """Layers and head learn together from the head's mean loss, in one backward.

    Without ``each_row`` the step's loss need only be right on average.
    """
    with span("forward"):
        h, read, features = forward(group, x)
    critic = group.critic
    with span("critic"):
        if features is None:
            u = read
            step = objective.of_logits(critic.head, h.detach(), u.detach(), target, scale, True)
        else:
            u = features(read)
            step = objective(
                critic.head,
                u.detach(),
                target,
                scale,
                activation=critic.activation,
                with_weight_gradient=True,
                each_row=each_row,
            )
        if critic.head is not None:
            accumulate(critic.head.weight, step.dweight)
            accumulate(critic.head.bias, step.dbias)
    with span("backward"):
        if u.requires_grad:
            u.backward(step.du)
    return LocalStep(h.detach(), step.loss)
