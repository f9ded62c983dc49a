"""Pipelined in one process: at tick t group k trains on batch t - k, on its own device or stream.

One thread starts the work of all groups. On CUDA devices it runs ahead of them, so groups on several devices, or on
several streams of one, run at once; on the CPU they run one after the other, which is the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lct_fast.codecs import Encoded
from lct_fast.engine.serial import SerialSteps
from lct_fast.engine.stats import Stats
from lct_fast.engine.worker import Worker


@dataclass(slots=True)
class _Cargo:
    """A batch between two groups. ``ready`` is recorded when ``h`` is; None on the host."""

    batch: int
    h: Tensor | Encoded
    target: Tensor
    losses: list[Tensor]
    ready: torch.cuda.Event | None = None


class Ticks:
    """All groups at once, each a batch behind the one before it.

    Args:
        workers: every group's, in order.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        self.batch = 0
        self.streams = [
            torch.cuda.Stream(w.device) if w.device.type == "cuda" else None for w in self.workers
        ]
        # What each group takes at the next tick.
        self.waiting: list[_Cargo | None] = [None] * len(self.workers)
        # Not told yet, oldest first: more than one where the pipeline was drained.
        self.finished: list[Stats] = []
        self.serial = SerialSteps(workers) if workers[0].settings.hybrid else None

    def step(self, x: Tensor, y: Tensor) -> Stats:
        """One tick: group 1 takes this batch, every other group the one before it left.

        A serial batch goes through all groups at once, after those before it.
        """
        done: Stats | None
        if self.serial is not None and self.serial.hybrid.is_serial(self.batch):
            done = self._serial_step(self.serial, x, y)
        else:
            done = self._tick(_Cargo(self.batch, x, y, [], self._ready(x)))
        self.batch += 1
        if done is not None:
            self.finished.append(done)
        if self.finished:
            return self.finished.pop(0)
        first = self.workers[0].device
        unknown = torch.full((len(self.workers),), float("nan"), device=first)
        return Stats(-1, unknown, 0, self._in_flight())

    def drain(self) -> list[Stats]:
        """Lets every group catch up with group 1; what each computes is the same as without."""
        while any(c is not None for c in self.waiting):
            done = self._tick(None)
            if done is not None:
                self.finished.append(done)
        for stream in self.streams:
            if stream is not None:
                torch.cuda.current_stream(stream.device).wait_stream(stream)
        finished, self.finished = self.finished, []
        return finished

    def flush(self) -> None:
        """Every critic learns from all feedback it is owed."""
        self.finished = self.drain()
        for worker in self.workers:
            worker.flush(self.batch)

    def _serial_step(self, serial: SerialSteps, x: Tensor, y: Tensor) -> Stats:
        self.finished = self.drain()
        stats = serial.step(self.batch, x, y)
        stats.in_flight = 0
        for stream in self.streams:
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream(stream.device))
        return stats

    def _tick(self, first: _Cargo | None) -> Stats | None:
        self.waiting[0] = first
        done, sent = None, 0
        # From the last group to the first: each takes what the one before left at the tick before.
        for k in reversed(range(len(self.workers))):
            cargo, self.waiting[k] = self.waiting[k], None
            if cargo is None:
                continue
            with self._on_stream(k):
                sent += self._train(k, cargo)
            if self.workers[k].last:
                losses = [v.to(self.workers[0].device) for v in cargo.losses]
                done = Stats(cargo.batch, torch.stack(losses), 0, 0)
        if done is not None:
            done.wire_bytes, done.in_flight = sent, self._in_flight()
        return done

    def _train(self, k: int, cargo: _Cargo) -> int:
        worker, batch = self.workers[k], cargo.batch
        if cargo.ready is not None:
            stream = torch.cuda.current_stream(worker.device)
            stream.wait_event(cargo.ready)
            parts = cargo.h.tensors if isinstance(cargo.h, Encoded) else (cargo.h,)
            for t in (*parts, cargo.target):
                if t.is_cuda:
                    t.record_stream(stream)
        worker.meter.begin(batch)
        target = cargo.target.to(worker.device)
        h = worker.decode(cargo.h) if isinstance(cargo.h, Encoded) else cargo.h
        result = worker.train(batch, worker.place(h), target)
        cargo.losses.append(worker.mean(result.loss, target))
        sent = 0
        if not worker.last:
            coded = worker.encode(result.h)
            sent, ready = coded.nbytes, self._ready(coded.tensors[-1])
            self.waiting[k + 1] = _Cargo(batch, coded, target, cargo.losses, ready)
        if worker.owes(batch):
            self._give_back(k, batch, result.loss)
        worker.update(batch)
        worker.learn(batch)
        worker.meter.end()
        return sent

    def _give_back(self, k: int, batch: int, loss: Tensor) -> None:
        self.workers[k].owe(batch, loss)
        before = self.workers[k - 1]
        ready = self._ready(loss)
        with self._on_stream(k - 1):
            if ready is not None:
                torch.cuda.current_stream(before.device).wait_event(ready)
            before.receive_feedback(batch, loss.to(before.device))

    def _in_flight(self) -> int:
        return sum(c is not None for c in self.waiting)

    def _on_stream(self, k: int) -> AbstractContextManager[Any]:
        stream = self.streams[k]
        return torch.cuda.stream(stream) if stream is not None else nullcontext()

    @staticmethod
    def _ready(t: Tensor) -> torch.cuda.Event | None:
        if not t.is_cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(t.device))
        return event
