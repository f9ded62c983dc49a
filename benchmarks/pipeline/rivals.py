"""Back-propagation as others run it: plain, over a pipeline of two processes, data-parallel."""

import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.pipeline.model import Task, halves, in_format

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
# "loss" and the gradient of every parameter that this process holds, by the parameter's name.
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """A contender and how it is run. ``method``, ``critic`` and ``codec`` are for those that train in groups."""

    kind: str
    format: str
    microbatches: int = 1
    method: str = ""
    critic: str = ""
    codec: str = ""

    @property
    def name(self) -> str:
        how = [self.kind, self.method, self.critic, self.codec, self.format]
        if not self.method:
            how.append(f"{self.microbatches} microbatches" if self.microbatches > 1 else "whole batch")
        return ", ".join(part for part in how if part)


class Contender:
    """One way to train the task, set up once in each process.

    Every process builds its part, runs the same number of steps, and times itself. A contender of one process
    is built in process 0 only.

    Attributes:
        loss: mean loss of the last batch, 0-dim, where this process has one.
    """

    processes = 2

    def __init__(self, task: Task, setting: Setting, rank: int) -> None:
        self.task = task
        self.setting = setting
        self.rank = rank
        self.data = task.data(setting.format)
        self.batch = 0
        self.loss: Tensor | None = None

    def next(self) -> tuple[Tensor, Tensor]:
        """The next batch, in turns."""
        x, y = self.data[self.batch % len(self.data)]
        self.batch += 1
        return x, y

    def first(self) -> Outputs:
        """Loss and gradients on batch 0 with the first weights. Called before any step; weights may move."""
        raise NotImplementedError

    def step(self) -> None:
        """Train on the next batch."""
        raise NotImplementedError

    def close(self) -> None:
        """The end, in every process."""

    def run(self, steps: int) -> float:
        """Train on 1 + ``steps`` batches; seconds of the last ``steps`` in this process.

        The first step of a visit finds other contenders' data in the caches, and fills a pipeline.
        """
        self.step()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        return time.perf_counter() - begin


def gradients(module: nn.Module) -> Outputs:
    """Copies of what the last backward left, by the parameter's name; the gradients are dropped."""
    out = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return out


class Backprop(Contender):
    """Plain back-propagation in one process of one thread, gradients accumulated over microbatches."""

    processes = 1
    threads = 1

    def __init__(self, task: Task, setting: Setting, rank: int) -> None:
        super().__init__(task, setting, rank)
        self.model = in_format(task.model(), setting.format)
        self.optimizer = task.optimizer(self.model.parameters())

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        count = self.setting.microbatches
        total = torch.zeros(())
        for a, b in zip(x.chunk(count), y.chunk(count), strict=True):
            loss = cross_entropy(self.model(a), b) / count
            loss.backward()
            total += loss.detach()
        return total

    def first(self) -> Outputs:
        loss = self.backward(*self.data[0])
        return {"loss": loss, **gradients(self.model)}

    def step(self) -> None:
        self.loss = self.backward(*self.next())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, steps: int) -> float:
        torch.set_num_threads(self.threads)
        try:
            return super().run(steps)
        finally:
            torch.set_num_threads(1)


class TwoThreads(Backprop):
    """Plain back-propagation in one process with both cores; the other process waits."""

    threads = 2


class Pipeline(Contender):
    """torch.distributed.pipelining: one half of the network in each process."""

    def __init__(self, task: Task, setting: Setting, rank: int) -> None:
        super().__init__(task, setting, rank)
        # Each map crosses in the strides that its convolutions want: see `halves`.
        parts = halves(task.model(), rows=setting.format == "channels_last")
        self.part = in_format(parts[rank], setting.format)
        self.optimizer = task.optimizer(self.part.parameters())
        stage = PipelineStage(self.part, rank, len(parts), torch.device("cpu"))
        self.schedule = SCHEDULES[setting.kind](stage, setting.microbatches, loss_fn=cross_entropy)

    def backward(self, x: Tensor, y: Tensor) -> Tensor | None:
        if self.rank == 0:
            self.schedule.step(x)
            return None
        losses: list[Tensor] = []
        self.schedule.step(target=y, losses=losses, return_outputs=False)
        return torch.stack([loss.detach() for loss in losses]).mean()

    def first(self) -> Outputs:
        loss = self.backward(*self.data[0])
        out = gradients(self.part)
        return out if loss is None else {"loss": loss, **out}

    def step(self) -> None:
        self.loss = self.backward(*self.next())
        self.optimizer.step()
        self.optimizer.zero_grad()


class DataParallel(Contender):
    """DistributedDataParallel: the whole network in each process, half of the batch each."""

    def __init__(self, task: Task, setting: Setting, rank: int) -> None:
        super().__init__(task, setting, rank)
        self.data = [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in self.data]
        self.model = in_format(task.model(), setting.format)
        # Gradients in the buckets spare a copy; nobody needs the running statistics to agree.
        with warnings.catch_warnings():
            # torch 2.13 has a new name for the first option, which torch 2.11 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            self.parallel = DistributedDataParallel(
                self.model, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.optimizer = task.optimizer(self.model.parameters())

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(self.parallel(x), y)
        loss.backward()
        return loss.detach()

    def first(self) -> Outputs:
        loss = self.backward(*self.data[0]).clone()
        torch.distributed.all_reduce(loss)
        out = {"loss": loss / 2, **gradients(self.model)}
        return out if self.rank == 0 else {}

    def step(self) -> None:
        self.loss = self.backward(*self.next())
        self.optimizer.step()
        self.optimizer.zero_grad()
