"""Groups on processes: rank replica * K + k trains group k + 1. torch.distributed underneath, nothing of our own."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lct_fast.engine.transport import heartbeat
from lct_fast.engine.transport.heartbeat import Heartbeat
from lct_fast.engine.transport.replicas import Replicas

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
    """This process's place among the processes of a run, a torch DeviceMesh ("replica", "group").

    Attributes:
        rank, size: place in the pipeline of this replica: rank k trains the group of index k, of ``size`` groups.
        base: global rank of the pipeline's first process; the global rank of any other is ``base`` + its rank.
        forward, backward: process groups of the pipeline, one a direction (NCCL on CUDA, gloo on CPU).
        control: gloo, of the pipeline, for headers.
        world: gloo, of all processes, for what they do together before and behind the stream.
        replicas: the processes that train the same group.
        ahead: seconds this process's clock is ahead of that of the pipeline's first process.
        places: per rank of the pipeline "host, device, process id". everywhere: the same, per global rank.
        heart: this process's beats, and its watch over those of all others.
        made: every process group that was made for this run.
    """

    rank: int
    size: int
    base: int
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup
    control: dist.ProcessGroup
    world: dist.ProcessGroup
    replicas: Replicas
    ahead: float
    places: list[str]
    everywhere: list[str]
    heart: Heartbeat
    made: list[dist.ProcessGroup]

    def close(self) -> None:
        """Ends the thread and the connections of this run, once all ranks are here.

        Raises:
            PeerError: another rank is lost.
        """
        with self.heart.together():
            dist.barrier(group=self.world)
        self.heart.close()
        for group in self.made:
            dist.destroy_process_group(group)
        self.made = []

    @staticmethod
    def join(
        units: Sequence[Sequence[str]],
        terms: Mapping[str, str],
        device: torch.device,
        replicas: int = 1,
        start_timeout: float = 600.0,
        step_timeout: float = 300.0,
    ) -> Ranks:
        """Agrees on groups and clocks with all other ranks; every rank calls it at the same point.

        Args:
            units: names of the modules in each group, which must be the same on every rank.
            terms: arguments that must be the same, by name.
            device: this rank's.
            replicas: number of pipelines.
            start_timeout, step_timeout: seconds, see ``Trainer``.

        Raises:
            ValueError: as many ranks as groups in all replicas are needed, or the ranks cut the model differently or
                were given other arguments.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        count = len(units)
        if size != count * replicas:
            raise ValueError(
                f"pipelined over processes takes one process a group: expected {count * replicas} processes for "
                f"{count} groups{f' in {replicas} replicas' if replicas > 1 else ''}, got {size}; start torchrun with "
                f"--nproc-per-node {count * replicas}"
            )
        backend = "nccl" if device.type == "cuda" else "gloo"
        mesh = init_device_mesh(
            device.type,
            (replicas, count),
            mesh_dim_names=("replica", "group"),
            backend_override={"replica": backend, "group": backend},
        )
        pipelines, columns = mesh.mesh.tolist(), mesh.mesh.t().tolist()
        forward, backward, control, same_group = (
            dist.new_subgroups_by_enumeration(members, timeout=_IDLE, backend=kind)[0]
            for members, kind in (
                (pipelines, backend),
                (pipelines, backend),
                (pipelines, "gloo"),
                (columns, "gloo"),
            )
        )
        world = dist.new_group(timeout=timedelta(seconds=start_timeout), backend="gloo")
        replica, k = divmod(rank, count)
        partners = Replicas(replica, columns[k], mesh.get_group("replica"), same_group)
        run = uuid.uuid4().hex
        mine = (socket.gethostname(), str(device), os.getpid(), [list(u) for u in units], run, dict(terms))
        everyone: list[tuple[str, str, int, list[list[str]], str, dict[str, str]]] = [mine] * size
        dist.all_gather_object(everyone, mine, group=world)
        for other, theirs in enumerate(everyone):
            if theirs[3] != everyone[0][3]:
                raise ValueError(
                    f"rank {other} cuts the model differently from rank 0 (groups start at "
                    f"{_starts(theirs[3])}, not {_starts(everyone[0][3])}): give split_points, measured ones vary"
                )
            for name, value in everyone[0][5].items():
                got = theirs[5].get(name)
                if got != value:
                    raise ValueError(
                        f"{name}: rank 0 has {value}, rank {other} has {got}: give every process the same"
                    )
        pipeline = pipelines[replica]
        hosts = [everyone[r][0] for r in pipeline]
        places = [f"{host}, {where}, process {pid}" for host, where, pid, *_ in everyone]
        ahead = _clock_offset(rank, pipeline, control) if len(set(hosts)) > 1 else 0.0
        # Rank 0's name for this run: keys of an earlier one, or of a restart, may still be in the store.
        store = heartbeat.store_of(everyone[0][4], step_timeout)
        heart = Heartbeat(store, rank, count, places, start_timeout, step_timeout)
        partners.lost = heart.verdict
        return Ranks(
            k,
            count,
            pipeline[0],
            forward,
            backward,
            control,
            world,
            partners,
            ahead,
            [places[r] for r in pipeline],
            places,
            heart,
            _distinct(
                mesh.get_group("replica"),
                mesh.get_group("group"),
                forward,
                backward,
                control,
                same_group,
                world,
            ),
        )


def _distinct(*groups: dist.ProcessGroup) -> list[dist.ProcessGroup]:
    """Each once, and not the program's own group of all processes."""
    own = {id(g): g for g in groups if g is not dist.group.WORLD}
    return list(own.values())


def _starts(units: list[list[str]]) -> list[str]:
    return [u[0] for u in units[1:] if u]


def _clock_offset(rank: int, pipeline: Sequence[int], control: dist.ProcessGroup) -> float:
    """Seconds this clock is ahead of that of the first of these ranks, from the quickest of a few questions."""
    best = (float("inf"), 0.0)
    first = pipeline[0]
    for other in pipeline[1:]:
        for _ in range(_ROUNDS):
            theirs = torch.zeros(1, dtype=torch.float64)
            if rank == first:
                dist.recv(theirs, other, group=control)
                dist.send(torch.tensor([time.perf_counter()], dtype=torch.float64), other, group=control)
            elif rank == other:
                asked = time.perf_counter()
                dist.send(theirs, first, group=control)
                dist.recv(theirs, first, group=control)
                answered = time.perf_counter()
                best = min(best, (answered - asked, (asked + answered) / 2 - float(theirs)))
    return best[1]
