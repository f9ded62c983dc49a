"""Groups on processes: rank k trains group k + 1. torch.distributed underneath, nothing of our own."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

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
        control: gloo, for headers and for what Python objects are exchanged.
        ahead: seconds this process's clock is ahead of rank 0's.
        places: per rank "host, device, process id".
    """

    rank: int
    size: int
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    control: dist.ProcessGroup
    ahead: float
    places: list[str]

    @staticmethod
    def join(units: Sequence[Sequence[str]], device: torch.device) -> Ranks:
        """Agrees on groups and clocks with all other ranks; every rank calls it at the same point.

        Args:
            units: names of the modules in each group, which must be the same on every rank.
            device: this rank's.

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
        forward, backward = dist.new_group(backend=backend), dist.new_group(backend=backend)
        control = dist.new_group(backend="gloo")
        mine = (socket.gethostname(), str(device), os.getpid(), [list(u) for u in units])
        everyone: list[tuple[str, str, int, list[list[str]]]] = [mine] * size
        dist.all_gather_object(everyone, mine, group=control)
        for other, theirs in enumerate(everyone):
            if theirs[3] != everyone[0][3]:
                raise ValueError(
                    f"rank {other} cuts the model differently from rank 0 (groups start at "
                    f"{_starts(theirs[3])}, not {_starts(everyone[0][3])}): give split_points, measured ones vary"
                )
        hosts = [host for host, *_ in everyone]
        places = [f"{host}, {where}, process {pid}" for host, where, pid, _ in everyone]
        ahead = _clock_offset(rank, size, control) if len(set(hosts)) > 1 else 0.0
        return Ranks(rank, size, forward, backward, control, ahead, places)


def _starts(units: list[list[str]]) -> list[str]:
    return [u[0] for u in units[1:] if u]


def _clock_offset(rank: int, size: int, control: dist.ProcessGroup) -> float:
    """Seconds this clock is ahead of rank 0's, from the quickest of a few questions."""
    best = (float("inf"), 0.0)
    for other in range(1, size):
        for _ in range(_ROUNDS):
            theirs = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                dist.recv(theirs, other, group=control)
                dist.send(torch.tensor([time.perf_counter()], dtype=torch.float64), other, group=control)
            elif rank == other:
                asked = time.perf_counter()
                dist.send(theirs, 0, group=control)
                dist.recv(theirs, 0, group=control)
                answered = time.perf_counter()
                best = min(best, (answered - asked, (asked + answered) / 2 - float(theirs)))
    return best[1]
