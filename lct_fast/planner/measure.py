"""Costs of a model's groups, measured here."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import mean, median, pvariance
from typing import Any

import torch
from torch import Tensor, nn

from lct_fast import codecs
from lct_fast.engine.network.group import Group
from lct_fast.methods import Greedy, Method, Objective
from lct_fast.methods.method import Slot
from lct_fast.planner.costs import GroupCost

_ROUNDS = 5
_PASSES = ("forward", "backward", "whole backward")
# Microbatches whose activations are kept at the same time: nothing is found in the caches that a step would not find.
_IN_FLIGHT = 2
_DELAY = 3


def measure(groups: Sequence[Group], rows: int, codec: str = "none") -> list[GroupCost]:
    """The costs of every group for a microbatch of ``rows`` samples, on the device where the model is.

    Parameters and buffers are left as they were. Inputs of later groups are random, half of them 0.

    Args:
        groups: what ``split`` returned.
        rows: samples.
        codec: what crosses the cuts.

    Raises:
        ValueError: a codec that does not fit what crosses a cut.
    """
    return [measure_group(groups, k, rows, codec) for k in range(len(groups))]


def measure_group(groups: Sequence[Group], k: int, rows: int, codec: str = "none") -> GroupCost:
    """As ``measure``, of ``groups[k]`` alone: medians of a few rounds.

    Images are in channels-last memory if the group's weights are.
    """
    group = groups[k]
    kept = [b.clone() for b in group.buffers()]
    try:
        timer = GroupTimer(groups, k, rows, codec)
        timer.round()
        timer.reset()
        for _ in range(_ROUNDS):
            timer.round()
        return timer.cost()
    finally:
        for buffer, value in zip(group.buffers(), kept, strict=True):
            buffer.copy_(value)
        group.zero_grad()


class GroupTimer:
    """Times the work of ``groups[k]`` on ``rows`` samples round by round, so that others can take turns with it.

    Buffers of the group move; its gradients are dropped at the end of a round.

    Args:
        method: what the group learns from when it learns on its own; greedy where none is given. A critic that learns
            from feedback does so ``_DELAY`` batches late, as in a pipelined run.
    """

    def __init__(
        self, groups: Sequence[Group], k: int, rows: int, codec: str = "none", method: Method | None = None
    ) -> None:
        self.group = groups[k]
        self.method = method or Greedy()
        self.slots: deque[Slot] = deque()
        self.group.train()
        self.first = k == 0
        parameter = next(self.group.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        shape = None if self.first else groups[k - 1].shape
        self.inputs = self._inputs(groups[0].cut.example, shape, rows)
        self.target = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.update = self._update()
        self.nbytes = 0.0
        with torch.no_grad():
            self.output = self.group.layers(self.inputs[0])
        if not self.group.last:
            self.nbytes = float(self.output.numel() * 4)
            self.encoder = codecs.build(codec)
            self.encoder.check(tuple(self.output.shape[1:]))
        if not self.first:
            self.coded = codecs.build(codec).encode(self.inputs[0])
            self.decoder = codecs.build(codec)
            # The first packet brings the codebook.
            self.coded = self.decoder.resolve(self.coded)
        self.reset()

    def round(self) -> None:
        """Every kind of work on two microbatches."""
        if not self.first:
            self._backprop("whole backward", True)
        self._backprop("backward", False)
        for x in self.inputs:
            self._time("local", self._local, x)
            if not self.group.last:
                self._time("encode", self.encoder.encode, self.output)
            if not self.first:
                self._time("decode", self.decoder.decode, self.coded)
        if self.update is not None:
            self._time("update", self.update.step)
        self.group.zero_grad()

    def reset(self) -> None:
        """Forget all rounds so far."""
        self.spans: dict[str, list[float]] = {}

    def jitter(self) -> float:
        """How much passes varied: standard deviation over mean, forward and backward passes together."""
        varied = [pvariance(s) / mean(s) ** 2 for n, s in self.spans.items() if n in _PASSES and mean(s)]
        return math.sqrt(mean(varied)) if varied else 0.0

    def cost(self, average: Callable[[list[float]], float] = median) -> GroupCost:
        """The averages over the rounds since the last ``reset``."""
        took = {name: average(spans) for name, spans in self.spans.items()}
        forward, local = took["forward"], took["local"]
        backward = took.get("whole backward", took["backward"])
        # A group on its own may need even less where it shares passes with its critic.
        alone = min(took["backward"], backward, max(local - forward, 0.0))
        return GroupCost(
            forward_s=forward,
            backward_s=backward,
            critic_s=max(local - forward - alone, 0.0),
            encode_s=took.get("encode", 0.0),
            decode_s=took.get("decode", 0.0),
            activation_bytes=self.nbytes,
            parameter_bytes=float(sum(p.numel() * p.element_size() for p in self.group.layers.parameters())),
            input_gradient_s=backward - alone,
            update_s=took.get("update", 0.0),
        )

    def _backprop(self, backward: str, input_gradient: bool) -> None:
        """All forward passes, then all backward passes, as the groups of a pipeline make them."""
        inputs = [x.detach().requires_grad_(input_gradient) for x in self.inputs]
        for out in [self._time("forward", self._forward, x) for x in inputs]:
            self._time(backward, self._backward, out, torch.ones_like(out))

    def _forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.group.layers(x)
        return nn.functional.cross_entropy(self.group.critic(h), self.target) if self.group.last else h

    def _backward(self, out: Tensor, gradient: Tensor) -> None:
        # A group without weights has nothing to compute.
        if out.requires_grad:
            out.backward(gradient)

    def _local(self, x: Tensor) -> None:
        objective, group, late = Objective(), self.group, self.method.uses_feedback and not self.group.last
        scale = objective.scale(self.target)
        step = self.method.local_step(group, x, self.target, objective, scale, keep_slot=late)
        if step.slot is not None:
            self.slots.append(step.slot)
        if len(self.slots) > _DELAY:
            slot = self.slots.popleft()
            self.method.critic_step(group.critic, slot, slot.loss, objective)

    def _time(self, name: str, work: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        out = work(*args)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.spans.setdefault(name, []).append(time.perf_counter() - start)
        return out

    def _inputs(self, example: Tensor, shape: tuple[int, ...] | None, rows: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        found = []
        for _ in range(_IN_FLIGHT):
            if shape is None:
                x = example[:1].expand(rows, *example.shape[1:]).contiguous()
            else:
                x = torch.randn(rows, *shape, generator=draw).relu_()
            found.append(x.to(self.device))
        weights = [p for p in self.group.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        if weights and weights[0].is_contiguous(memory_format=torch.channels_last):
            found = [x.contiguous(memory_format=torch.channels_last) for x in found]
        return found

    def _update(self) -> torch.optim.Optimizer | None:
        """SGD with momentum, on copies of the group's parameters, its critic's among them."""
        copies = [p.detach().clone().requires_grad_() for p in self.group.parameters()]
        if not copies:
            return None
        for p in copies:
            p.grad = torch.zeros_like(p)
        return torch.optim.SGD(copies, 0.1, momentum=0.9, fused=self.device.type in ("cpu", "cuda"))


def ratio(spec: str, shape: tuple[int, ...], rows: int) -> float:
    """How many times fewer bytes ``spec`` sends of [rows, *shape] than fp32, codebooks left out."""
    codec = codecs.build(spec)
    codec.check(shape)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *shape, generator=draw).relu_()
    codec.encode(x)
    return x.numel() * 4 / codec.encode(x, learn=False).nbytes
