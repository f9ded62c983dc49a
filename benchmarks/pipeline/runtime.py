"""What torch's pipelines and DDP take of a worker's time by themselves: the same tensors, next to no computation."""

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.pipeline.gather import gathered
from benchmarks.pipeline.model import CLASSES, Task

_STEPS = 12


def crossing(task: Task, microbatches: int) -> Tensor:
    """What crosses the cut for one microbatch: zeros [rows, H, W, C]."""
    state = task.states("contiguous")[0]
    return torch.zeros_like(state[: task.batch // microbatches]).permute(0, 2, 3, 1).contiguous()


class Source(nn.Module):
    """A map that is a parameter, whatever comes in."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.map = nn.Parameter(like.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.map.clone()


class Sink(nn.Module):
    """The first values of each row as logits."""

    def forward(self, h: Tensor) -> Tensor:
        return h.flatten(1)[:, :CLASSES]


def pipeline_message(task: Task, microbatches: int, latency: float, rank: int) -> float:
    """Seconds of a worker for each message of GPipe.

    In a step of m microbatches without computation 2 (m + 1) passes come one after the other, each with one message,
    and twice a message is waited for.
    """
    part = Source(crossing(task, microbatches)) if rank == 0 else Sink()
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, microbatches, loss_fn=cross_entropy)
    x, y = torch.zeros(task.batch, 1), torch.zeros(task.batch, dtype=torch.int64)
    taken = _median(lambda: schedule.step(x) if rank == 0 else schedule.step(target=y, return_outputs=False))
    return max(taken - 2 * latency, 0.0) / (2 * (microbatches + 1))


def ddp_step(task: Task, rank: int) -> float:
    """Seconds of a backward pass with DDP around the network's parameters, of which one value each is used."""

    class Parameters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.ParameterList(p.detach().clone() for p in task.model().parameters())

        def forward(self) -> Tensor:
            return torch.stack([p.view(-1)[0] for p in self.all]).sum()

    parallel = DistributedDataParallel(Parameters(), gradient_as_bucket_view=True)
    return _median(lambda: parallel().backward())


def _median(step: Callable[[], object]) -> float:
    """Seconds of a step that both processes take part in, the slower one counting."""
    taken = []
    for turn in range(_STEPS + 2):
        dist.barrier()
        begin = time.perf_counter()
        step()
        seconds = max(gathered(time.perf_counter() - begin))
        if turn > 1:
            taken.append(seconds)
    return median(taken)
