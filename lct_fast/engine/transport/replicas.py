"""Replicas of a group: processes that train it on different parts of each batch, as data parallelism does."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lct_fast.engine.errors import PeerError, ReplicaError, first_line

# Seconds between two looks for the other replicas.
_TURN = 0.05
# Batches between two comparisons of the replicas' codebooks.
COMPARE_EVERY = 100


def part(t: Tensor, replica: int, replicas: int) -> Tensor:
    """The rows of a whole batch ``t`` [N, ...] that a replica trains on: its contiguous N / replicas, a view."""
    if len(t) % replicas:
        raise ValueError(
            f"a batch is shared equally: expected rows that {replicas} replicas divide, got {len(t)}"
        )
    rows = len(t) // replicas
    return t[replica * rows : (replica + 1) * rows]


class Replicas:
    """The processes that train one group, seen from one of them.

    Without arguments the group is trained in one process, and nothing here communicates. Otherwise methods are
    collectives: all replicas call the same ones in the same order, which the order of batches gives.

    Args:
        index: of this replica, from 0.
        ranks: global rank of each replica's process.
        data: process group of these ranks for gradients and codebooks, NCCL or gloo.
        control: gloo, for what lies on the host.
    """

    def __init__(
        self,
        index: int = 0,
        ranks: Sequence[int] = (0,),
        data: dist.ProcessGroup | None = None,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self.index, self.ranks = index, list(ranks)
        self.data, self.control = data, control
        # Makes the error to raise where one of them has gone.
        self.lost: Callable[[str], PeerError] = PeerError
        self._ddp: DistributedDataParallel | None = None

    @property
    def count(self) -> int:
        """Number of replicas."""
        return len(self.ranks)

    def wrap(self, layers: nn.Module, fused: nn.Module | None) -> tuple[Any, Any]:
        """A group's layers and their fused variant; backward through either averages its gradients over replicas.

        One DistributedDataParallel around both, as they share their parameters.
        """
        if self.count == 1 or not any(p.requires_grad for p in layers.parameters()):
            return layers, fused
        # torch 2.13 has another name for broadcast_buffers, and warns of this one.
        known = inspect.signature(DistributedDataParallel).parameters
        name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in known)
        own_buffers: dict[str, Any] = {name: False}
        self._ddp = DistributedDataParallel(
            _Ways([layers] if fused is None else [layers, fused]),
            process_group=self.data,
            find_unused_parameters=False,
            **own_buffers,
        )
        return _Way(self._ddp, 0), None if fused is None else _Way(self._ddp, 1)

    @contextmanager
    def averaging(self, now: bool) -> Iterator[None]:
        """Forward and backward inside average the wrapped layers' gradients if ``now``, else they only add to them."""
        with nullcontext() if now or self._ddp is None else self._ddp.no_sync(), self._peers():
            yield

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients of parameters that ``wrap`` knows nothing of, in place."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient, total in zip(gradients, self.sum(*gradients), strict=True):
            gradient.copy_(total.div_(self.count))

    def weight(self, counted: Tensor) -> Tensor:
        """What to multiply this replica's mean by, so that the average over replicas is the mean over all rows.

        Args:
            counted: rows of this replica's part that carry a loss, a 0-dim tensor.
        """
        (total,) = self.sum(counted)
        return counted * self.count / total.clamp(min=1)

    def mean(self, mean: Tensor, counted: Tensor) -> Tensor:
        """The mean over the rows of all replicas, given that over the ``counted`` rows of this one; 0-dim tensors."""
        total, rows = self.sum(torch.stack([mean * counted, counted.to(mean.dtype)]))[0]
        return total / rows.clamp(min=1)

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Each tensor summed over replicas; the same bits in all of them."""
        if self.count == 1:
            return list(tensors)
        totals = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        with self._peers():
            works = [dist.all_reduce(t, group=self.data, async_op=True) for t in totals]
            for work in works:
                if work is not None:
                    work.wait()
        return totals

    def any(self, flags: Tensor) -> Tensor:
        """1 where any replica has raised a flag, else 0."""
        return flags if self.count == 1 else self.sum(flags)[0].clamp_(max=1)

    def first(self, t: Tensor) -> Tensor:
        """Replica 0's ``t``."""
        if self.count == 1:
            return t
        value = t.detach().clone(memory_format=torch.contiguous_format)
        with self._peers():
            dist.broadcast(value, self.ranks[0], group=self.data)
        return value

    def align(self, module: nn.Module) -> None:
        """Gives all replicas the parameters and buffers of replica 0's ``module``."""
        if self.count > 1:
            for t in module.state_dict().values():
                t.copy_(self.first(t))

    def compare(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Waits for all replicas and checks that they hold the same bits.

        Raises:
            ReplicaError: names the ranks that differ from replica 0's.
        """
        if self.count == 1:
            return
        digest = hashlib.blake2b(digest_size=16)
        for t in tensors:
            digest.update(t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        found: list[Any] = [None] * self.count
        with self._peers():
            dist.all_gather_object(found, digest.hexdigest(), group=self.control)
        odd = [rank for rank, each in zip(self.ranks, found, strict=True) if each != found[0]]
        if odd:
            raise ReplicaError(
                f"replicas have drifted apart: expected {what} to be that of rank {self.ranks[0]}, got another on "
                f"{_named(odd)}; go on from the last checkpoint, on machines of one kind"
            )

    def wait(self) -> None:
        """Waits until all replicas are here."""
        if self.count > 1:
            with self._peers():
                dist.barrier(group=self.control)

    def meet(self, waits: Callable[[str], None]) -> None:
        """As ``wait``, where it may take long: tells ``waits`` again and again what for."""
        if self.count == 1:
            return
        with self._peers():
            work = dist.barrier(group=self.control, async_op=True)
            while not work.is_completed():
                waits("the other replicas of its group")
                time.sleep(_TURN)
            work.wait()

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Tells of a process that has gone by its own error."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            others = _named([r for r in self.ranks if r != self.ranks[self.index]])
            raise self.lost(
                f"lost a replica of this group, {others} ({first_line(error)}): see its own error, then go on from "
                f"the last checkpoint"
            ) from None


class _Ways(nn.Module):
    """Several modules that share their parameters, of which each call runs one."""

    def __init__(self, ways: Sequence[nn.Module]) -> None:
        super().__init__()
        self.ways = nn.ModuleList(ways)

    def forward(self, way: int, x: Tensor) -> Any:
        return self.ways[way](x)


class _Way:
    """One of them under DistributedDataParallel; other attributes are the module's own."""

    def __init__(self, ddp: DistributedDataParallel, way: int) -> None:
        self._ddp, self._way = ddp, way

    def __call__(self, x: Tensor) -> Any:
        return self._ddp(self._way, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ddp.module.ways[self._way], name)


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
