"""Costs of a model's groups, measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from lct_fast import codecs
from lct_fast.engine.group import Group
from lct_fast.methods import Greedy, Objective
from lct_fast.planner.costs import GroupCost

_REPEATS = 7


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
    """As ``measure``, of ``groups[k]`` alone. Images are in channels-last memory if the group's weights are."""
    group = groups[k]
    kept = [b.clone() for b in group.buffers()]
    try:
        return _measure(groups, k, rows, codec)
    finally:
        for buffer, value in zip(group.buffers(), kept, strict=True):
            buffer.copy_(value)
        group.zero_grad()


def _measure(groups: Sequence[Group], k: int, rows: int, spec: str) -> GroupCost:
    group = groups[k]
    group.train()
    parameter = next(group.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    example = groups[0].cut.example
    x = _input(example, None if k == 0 else groups[k - 1].shape, rows, device)
    weights = [p for p in group.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    if weights and weights[0].is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    target = torch.zeros(rows, dtype=torch.int64, device=device)
    needs_gradient = k > 0

    def forward(x: Tensor) -> Tensor:
        h: Tensor = group.layers(x)
        return nn.functional.cross_entropy(group.critic(h), target) if group.last else h

    def whole(gradient: bool) -> None:
        out = forward(x.detach().requires_grad_(gradient) if gradient else x)
        if out.requires_grad:
            out.backward(torch.ones_like(out))

    def local() -> None:
        method, objective = Greedy(), Objective()
        method.local_step(group, x, target, objective, objective.scale(target))

    ahead = seconds(lambda: forward(x), device)
    both = seconds(lambda: whole(needs_gradient), device)
    without = seconds(lambda: whole(False), device) if needs_gradient else both
    alone = seconds(local, device)
    backward = max(both - ahead, 0.0)
    encode = decode = nbytes = 0.0
    h = group.layers(x).detach()
    if not group.last:
        nbytes = float(h.numel() * 4)
        codec = codecs.build(spec)
        codec.check(tuple(h.shape[1:]))
        encode = seconds(lambda: codec.encode(h), device)
    if k > 0:
        coded = codecs.build(spec).encode(x)
        decoder = codecs.build(spec)
        first = decoder.resolve(coded)
        decode = seconds(lambda: decoder.decode(first), device)
    return GroupCost(
        forward_s=ahead,
        backward_s=backward,
        critic_s=max(alone - without, 0.0),
        encode_s=encode,
        decode_s=decode,
        activation_bytes=nbytes,
        parameter_bytes=float(sum(p.numel() * p.element_size() for p in group.layers.parameters())),
        input_gradient_s=min(max(both - without, 0.0), backward),
        update_s=_update(group, device),
    )


def _input(example: Tensor, shape: tuple[int, ...] | None, rows: int, device: torch.device) -> Tensor:
    if shape is None:
        return example[:1].expand(rows, *example.shape[1:]).contiguous().to(device)
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, *shape, generator=draw).relu_().to(device)


def _update(group: Group, device: torch.device) -> float:
    """Seconds of SGD with momentum on copies of the group's parameters."""
    copies = [p.detach().clone().requires_grad_() for p in group.layers.parameters()]
    if not copies:
        return 0.0
    for p in copies:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(copies, 0.1, momentum=0.9, fused=device.type in ("cpu", "cuda"))
    return seconds(lambda: optimizer.step(), device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of a few calls, after two to warm up."""
    samples = []
    for _ in range(_REPEATS + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return median(samples[2:])


def ratio(spec: str, shape: tuple[int, ...], rows: int) -> float:
    """How many times fewer bytes ``spec`` sends of [rows, *shape] than fp32, codebooks left out."""
    codec = codecs.build(spec)
    codec.check(shape)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *shape, generator=draw).relu_()
    codec.encode(x)
    return x.numel() * 4 / codec.encode(x, learn=False).nbytes
