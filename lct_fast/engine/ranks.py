"""Groups on processes: rank k trains group k + 1. torch.distributed underneath, nothing of our own."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lct_fast.engine import heartbeat
from lct_fast.engine.heartbeat import Heartbeat

# A link may be idle for as long as it likes, in a long evaluation for example: the heartbeat ends what must end.
_IDLE = timedelta(days=30)
# Rounds of the clock comparison between machines; the one with the shortest way counts.
_ROUNDS = 8


@dataclass(slots=True)
class ProcessTransport:
    """Point-to-point over torch.distributed: headers through ``control`` (host memory), bodies through ``data``.

    ``tag`` tells the directions of one pair of ranks apart.
    """

    peer: int
    data: dist.ProcessGroup
    control: dist.ProcessGroup
    tag: int

    def send(self, header: Tensor, body: Tensor | None) -> None:
        works = [dist.isend(header, self.peer, group=self.control, tag=2 * self.tag)]
        if body is not None:
            works.append(dist.isend(body, self.peer, group=self.data, tag=2 * self.tag + 1))
        _wait(works)

    def receive_header(self, header: Tensor) -> None:
        _wait([dist.irecv(header, self.peer, group=self.control, tag=2 * self.tag)])

    def receive_body(self, body: Tensor) -> None:
        _wait([dist.irecv(body, self.peer, group=self.data, tag=2 * self.tag + 1)])


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()


@dataclass(slots=True)
class Ranks:
    """This process's place among the processes of a run.

    Attributes:
        rank, size: rank k trains the group of index k; there are as many groups as ranks.
        forward, backward: a process group for each direction (NCCL on CUDA, gloo on CPU).
        control: gloo, for headers.
        meeting: gloo, for what all ranks do together before and behind the stream.
        ahead: seconds this process's clock is ahead of rank 0's.
        places: per rank "host, device, process id".
        heart: this rank's beats, and its watch over the others'.
    """

    rank: int
    size: int
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    control: dist.ProcessGroup
    meeting: dist.ProcessGroup
    ahead: float
    places: list[str]
    heart: Heartbeat

    @staticmethod
    def join(
        units: Sequence[Sequence[str]],
        device: torch.device,
        start_timeout: float = 600.0,
        step_timeout: float = 60.0,
    ) -> Ranks:
        """Agrees on groups and clocks with all other ranks; every rank calls it at the same point.

        Args:
            units: names of the modules in each group, which must be the same on every rank.
            device: this rank's.
            start_timeout, step_timeout: seconds, see ``Trainer``.

        Raises:
            ValueError: as many ranks as groups are needed, or the ranks cut the model differently.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        if size != len(units):
            raise ValueError(
                f"pipelined over processes takes one process a group: expected {len(units)} processes for "
                f"{len(units)} groups, got {size}; start torchrun with --nproc-per-node {len(units)}"
            )
        backend = "nccl" if device.type == "cuda" else "gloo"
        forward, backward = (dist.new_group(timeout=_IDLE, backend=backend) for _ in range(2))
        control = dist.new_group(timeout=_IDLE, backend="gloo")
        meeting = dist.new_group(timeout=timedelta(seconds=start_timeout), backend="gloo")
        run = uuid.uuid4().hex
        mine = (socket.gethostname(), str(device), os.getpid(), [list(u) for u in units], run)
        everyone: list[tuple[str, str, int, list[list[str]], str]] = [mine] * size
        dist.all_gather_object(everyone, mine, group=meeting)
        for other, theirs in enumerate(everyone):
            if theirs[3] != everyone[0][3]:
                raise ValueError(
                    f"rank {other} cuts the model differently from rank 0 (groups start at "
                    f"{_starts(theirs[3])}, not {_starts(everyone[0][3])}): give split_points, measured ones vary"
                )
        hosts = [host for host, *_ in everyone]
        places = [f"{host}, {where}, process {pid}" for host, where, pid, *_ in everyone]
        ahead = _clock_offset(rank, size, meeting) if len(set(hosts)) > 1 else 0.0
        # Rank 0's name for this run: keys of an earlier one, or of a restart, may still be in the store.
        store = heartbeat.store_of(everyone[0][4], step_timeout)
        heart = Heartbeat(store, rank, places, start_timeout, step_timeout)
        return Ranks(rank, size, forward, backward, control, meeting, ahead, places, heart)


def _starts(units: list[list[str]]) -> list[str]:
    return [u[0] for u in units[1:] if u]


def _clock_offset(rank: int, size: int, meeting: dist.ProcessGroup) -> float:
    """Seconds this clock is ahead of rank 0's, from the quickest of a few questions."""
    best = (float("inf"), 0.0)
    for other in range(1, size):
        for _ in range(_ROUNDS):
            theirs = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                dist.recv(theirs, other, group=meeting)
                dist.send(torch.tensor([time.perf_counter()], dtype=torch.float64), other, group=meeting)
            elif rank == other:
                asked = time.perf_counter()
                dist.send(theirs, 0, group=meeting)
                dist.recv(theirs, 0, group=meeting)
                answered = time.perf_counter()
                best = min(best, (answered - asked, (asked + answered) / 2 - float(theirs)))
    return best[1]
