"""Codecs chosen by measurement: each cut takes the most exact one that does not slow the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lct_fast import codecs
from lct_fast.engine.network import carried
from lct_fast.engine.transport.ranks import Ranks
from lct_fast.engine.worker import Worker
from lct_fast.methods import Objective

# Most exact first. A vq of the deepest vectors that divide the channels comes last.
_EXACT_FIRST = ("none", "bf16", "int8", "int4")
_WORDS, _DEPTHS = 256, (8, 6, 5, 4, 3, 2)
# Predicted steps this close to the shortest count as equally short.
SLACK = 0.02
_REPEATS = 5
_PROBE_BYTES = 1 << 22


@dataclass(slots=True)
class Costs:
    """What was measured at one group, in seconds for the example input's batch, and at the cut behind it.

    Attributes:
        step: forward, critic and backward of the group.
        encode, decode: by codec, of what leaves and of what comes.
        sizes: by codec, bytes that leave.
        latency, bandwidth: of the link behind: seconds, and bytes a second (inf where nothing is moved).
    """

    step: float
    encode: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    latency: float = 0.0
    bandwidth: float = float("inf")

    def wire(self, codec: str) -> float:
        """Seconds that the link behind is busy with a batch."""
        return self.latency + self.sizes[codec] / self.bandwidth


@dataclass(frozen=True, slots=True)
class Choice:
    """The codec of one cut, and the step that was predicted with each candidate, seconds."""

    codec: str
    predicted: dict[str, float]
    reason: str


def candidates(shape: tuple[int, ...]) -> list[str]:
    """Specs that fit activations of this shape (without the batch), most exact first."""
    channels = shape[0] if len(shape) == 3 else shape[-1]
    depth = next((d for d in _DEPTHS if channels % d == 0), None)
    return [*_EXACT_FIRST, *([f"vq:{_WORDS},{depth}"] if depth else [])]


def choose(costs: Sequence[Costs]) -> list[Choice]:
    """The codec of each cut, from the first to the last.

    A pipeline's step is as long as its busiest group or link. A group is busy with its own work, with decoding what
    comes and encoding what leaves; a link with bytes / bandwidth + latency. For each cut in turn the step is predicted
    with every candidate, and the most exact one within 2 % of the shortest is taken.

    Args:
        costs: one a group, in order; candidates of a cut are the keys of ``sizes`` before it, most exact first.
    """
    busy = [c.step for c in costs]
    links = [min(c.wire(s) for s in c.sizes) for c in costs[:-1]]
    choices = []
    for k, (cost, behind) in enumerate(zip(costs, costs[1:], strict=False)):
        others = max(
            [*(b for i, b in enumerate(busy) if i not in (k, k + 1)), *links[:k], *links[k + 1 :]], default=0
        )
        predicted = {
            s: max(others, busy[k] + cost.encode[s], busy[k + 1] + behind.decode[s], cost.wire(s))
            for s in cost.sizes
        }
        shortest = min(predicted.values())
        chosen = next(s for s, seconds in predicted.items() if seconds <= shortest * (1 + SLACK))
        busy[k] += cost.encode[chosen]
        busy[k + 1] += behind.decode[chosen]
        links[k] = cost.wire(chosen)
        choices.append(Choice(chosen, predicted, _reason(chosen, predicted, cost)))
    return choices


def _reason(chosen: str, predicted: dict[str, float], cost: Costs) -> str:
    if cost.bandwidth == float("inf"):
        return "nothing is moved: both groups are on one device"
    steps = ", ".join(f"{s} {1e3 * seconds:.1f}" for s, seconds in predicted.items())
    return (
        f"the most exact codec whose step is within {SLACK:.0%} of the shortest; predicted ms a step: {steps}; link "
        f"{cost.bandwidth / 1e6:.0f} MB/s, {1e6 * cost.latency:.0f} us, busy {1e3 * cost.wire(chosen):.1f} ms "
        f"with {chosen}"
    )


def decide(
    workers: Sequence[Worker],
    specs: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    example: Tensor,
    ranks: Ranks | None,
) -> list[Choice]:
    """The measured choice for each cut, the same in all processes; arguments as of ``measure``."""
    choices = choose(measure(workers, specs, shapes, example, ranks))
    if ranks is not None:
        # Of replicas the first decides, as all must have the same.
        with ranks.heart.together():
            dist.broadcast_object_list(choices, 0, group=ranks.world)
    return choices


def measure(
    workers: Sequence[Worker],
    specs: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    example: Tensor,
    ranks: Ranks | None,
) -> list[Costs]:
    """The costs of every group; over processes each measures its own, all at once, and they are exchanged.

    Args:
        workers: the groups of this process. Their state is left as it was.
        specs: of all cuts; those that say "auto" have several candidates.
        shapes: of what crosses each cut, without the batch.
        example: input of the network, a batch as in training.
        ranks: None in one process.
    """
    options = [candidates(s) if spec == "auto" else [spec] for spec, s in zip(specs, shapes, strict=True)]
    costs = []
    for worker in workers:
        k = worker.index
        x = example if k == 0 else _activations(len(example), shapes[k - 1])
        x = worker.place(x.to(worker.device))
        cost, h = _group_costs(worker, x)
        for spec in options[k - 1] if k > 0 else ():
            codec = codecs.build(spec)
            coded = codec.encode(x)
            cost.decode[spec] = _seconds(partial(codec.decode, coded), worker.device)
        for spec in options[k] if not worker.last else ():
            codec = codecs.build(spec)
            cost.encode[spec] = _seconds(partial(codec.encode, h), worker.device)
            cost.sizes[spec] = codec.encode(h, learn=False).nbytes
        costs.append(cost)
    if ranks is not None:
        return _exchange(costs[0], workers[0].device, ranks)
    for cost, worker, behind in zip(costs, workers, workers[1:], strict=False):
        if worker.device != behind.device:
            cost.latency, cost.bandwidth = _copy_speed(worker.device, behind.device)
    return costs


def _activations(rows: int, shape: tuple[int, ...]) -> Tensor:
    """What might cross a cut: half of it is 0."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, *shape, generator=draw).relu_()


def _group_costs(worker: Worker, x: Tensor) -> tuple[Costs, Tensor]:
    """Costs with the time of a local step on ``x``, and h_k; buffers and random state stay, no gradient is left."""
    group, method = worker.group, worker.settings.method
    kept = [b.clone() for b in group.buffers()]
    target = torch.zeros(x.shape[: group.cut.target_dims], dtype=torch.int64, device=worker.device)
    objective = Objective()
    scale = objective.scale(target)
    group.train()

    def step() -> Tensor:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), worker.autocast():
            return method.local_step(worker, x, target, objective, scale).h

    seconds, h = _seconds(step, worker.device), step()
    group.zero_grad()
    carried.begin_sequence([group])
    for buffer, value in zip(group.buffers(), kept, strict=True):
        buffer.copy_(value)
    return Costs(seconds), h


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of a few, after one to warm up."""
    samples = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        _finish(device)
        samples.append(time.perf_counter() - start)
    return median(samples[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy_speed(source: torch.device, target: torch.device) -> tuple[float, float]:
    """Latency, and bytes a second, of copies between two devices."""
    small, large = (torch.zeros(size, dtype=torch.uint8, device=source) for size in (64, _PROBE_BYTES))
    latency = _seconds(lambda: small.to(target), target)
    return latency, _bandwidth(latency, _seconds(lambda: large.to(target), target))


def _exchange(mine: Costs, device: torch.device, ranks: Ranks) -> list[Costs]:
    """Every rank's costs, each with the speed of the link behind it, in every process."""
    # Links that share no process are measured at once.
    for first in (0, 1):
        for front in range(first, ranks.size - 1, 2):
            if ranks.rank == front:
                mine.latency, mine.bandwidth = _ask(front + 1, device, ranks)
            elif ranks.rank == front + 1:
                _answer(front, device, ranks)
    everyone: list[Costs] = [mine] * len(ranks.everywhere)
    with ranks.heart.together():
        dist.all_gather_object(everyone, mine, group=ranks.world)
    return everyone[ranks.base : ranks.base + ranks.size]


def _ask(peer: int, device: torch.device, ranks: Ranks) -> tuple[float, float]:
    """Latency of the link to ``peer``, and its bytes a second, from the time until its answers."""
    answer, there = torch.zeros(1, device=device), ranks.base + peer
    seconds = []
    for size in (64, _PROBE_BYTES):
        body = torch.zeros(size, dtype=torch.uint8, device=device)

        def there_and_back(body: Tensor = body) -> None:
            dist.send(body, there, group=ranks.forward)
            dist.recv(answer, there, group=ranks.backward)

        seconds.append(_seconds(there_and_back, device))
    small, large = seconds
    return small / 2, _bandwidth(small, large)


def _bandwidth(small: float, large: float) -> float:
    """Bytes a second, from the seconds for a few bytes and for the probe's; noise counts at most half of the latter."""
    return _PROBE_BYTES / max(large - small, large / 2)


def _answer(peer: int, device: torch.device, ranks: Ranks) -> None:
    answer, there = torch.zeros(1, device=device), ranks.base + peer
    for size in (64, _PROBE_BYTES):
        body = torch.zeros(size, dtype=torch.uint8, device=device)
        for _ in range(_REPEATS + 1):
            dist.recv(body, there, group=ranks.forward)
            dist.send(answer, there, group=ranks.backward)
