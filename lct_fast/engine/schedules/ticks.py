"""Pipelined in one process: at tick t group k trains on batch t - k, on its own device or stream.

One thread starts the work of all groups and waits for none of it. On CUDA devices each group has a stream of its own,
so groups on several devices, or on one, run at once, and what travels between them is copied meanwhile; on the CPU they
run one after the other, which is the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lct_fast.codecs import Layout
from lct_fast.engine.cuda import streams
from lct_fast.engine.cuda.ring import Ring
from lct_fast.engine.cuda.streams import Device, Stream
from lct_fast.engine.schedules.graphs import GroupGraphs, Inputs, Work, train_work, why_eager
from lct_fast.engine.schedules.serial import SerialSteps
from lct_fast.engine.schedules.stage import DEPTH
from lct_fast.engine.stats import Stats
from lct_fast.engine.worker import Worker, check_flags


@dataclass(slots=True)
class _Cargo:
    """A batch in the slot before a group: tensors are target, losses of the groups so far (before the first group:
    none), and the flag of a refused batch if there is one; then h, coded as ``layout`` says unless that is None."""

    batch: int
    refusable: bool
    layout: Layout | None = None
    version: int = 0
    samples: Tensor | None = None


class Ticks:
    """All groups at once, each a batch behind the one before it.

    Args:
        workers: every group's, in order.
        graphs: run groups as CUDA graphs: True, False, or None for where they can.
        drive: what drives a device.

    Raises:
        ValueError: ``graphs`` is True, and a group cannot run so.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        graphs: bool | None = None,
        drive: Callable[[torch.device], Device] = streams.device,
    ) -> None:
        self.workers = list(workers)
        self.batch = 0
        self._drive = drive
        self._driven: dict[torch.device, Device] = {}
        self.devices = [self._device(w.device) for w in self.workers]
        self.streams = [d.stream("compute") for d in self.devices]
        self.graphs = [self._graphs(k, graphs) for k in range(len(self.workers))]
        # A loss that goes back stays in its slot until its delay is over.
        learns = self.workers[0].settings.method.uses_feedback
        owed = max(DEPTH, self.workers[0].settings.feedback_delay + 1) if learns else DEPTH
        # A graph reads and writes where it was recorded, and what its critic needs stays there as long.
        self.depth = depth = owed if any(self.graphs) else DEPTH
        for each in self.graphs:
            if each is not None:
                each.depth = depth
        # What leads to group k; the first ring is made when it is known where batches lie.
        self.forward: list[Ring | None] = [None]
        self.forward += [Ring(a, b, depth) for a, b in zip(self.devices, self.devices[1:], strict=False)]
        # What brings group k the losses of the group behind it.
        pairs = zip(self.devices, self.devices[1:], strict=False) if learns else ()
        self.backward = [Ring(b, a, owed) for a, b in pairs]
        # What each group takes at the next tick.
        self.waiting: list[_Cargo | None] = [None] * len(self.workers)
        # Not told yet, oldest first: more than one where the pipeline was drained.
        self.finished: list[Stats] = []
        # Whether a tick failed half way: feedback is missing then, and batches are lost.
        self.failed = False
        # Whether the caller may have changed something that the groups' streams have to wait for.
        self.settled = True
        self.serial = SerialSteps(workers) if workers[0].settings.hybrid else None

    def step(
        self, x: Tensor, y: Tensor, refused: Tensor | None = None, samples: Tensor | None = None
    ) -> Stats:
        """One tick: group 1 takes this batch, every other group the one before it left.

        A serial batch goes through all groups at once, after those before it. A batch leaves no trace where
        ``refused``, 0-dim, is 1.
        """
        self.check_whole()
        check_flags(self.workers, lambda k: self.devices[k].on(self.streams[k]))
        done: Stats | None
        if self.serial is not None and self.serial.hybrid.is_serial(self.batch):
            done = self._serial_step(self.serial, x, y)
        else:
            if self.settled:
                for device, stream in zip(self.devices, self.streams, strict=True):
                    _join(device, stream, device.current())
                self.settled = False
            self._enter(x, y, refused, samples)
            done = self._tick()
        self.batch += 1
        if done is not None:
            self.finished.append(done)
        if self.finished:
            return self.finished.pop(0)
        return Stats(-1, torch.full((len(self.workers),), float("nan")), 0, self._in_flight())

    def drain(self) -> list[Stats]:
        """Lets every group catch up with group 1; what each computes is the same as without."""
        while any(c is not None for c in self.waiting):
            done = self._tick()
            if done is not None:
                self.finished.append(done)
        for device, stream in self._all_streams():
            _join(device, device.current(), stream)
        self.settled = True
        finished, self.finished = self.finished, []
        return finished

    def flush(self) -> None:
        """Every critic learns from all feedback it is owed."""
        self.check_whole()
        self.finished = self.drain()
        for worker in self.workers:
            worker.flush(self.batch)

    def check_whole(self) -> None:
        """Refuses to go on behind a tick that failed half way.

        Raises:
            RuntimeError: until ``give_up``.
        """
        if self.failed:
            raise RuntimeError(
                "an earlier step failed, and what was on its way between the groups is lost: load a checkpoint, or "
                "build the trainer anew"
            )

    def give_up(self) -> None:
        """Forgets what is on its way and what failed: the state of a checkpoint takes its place."""
        self.waiting = [None] * len(self.workers)
        self.failed = False
        self.drain()

    def _serial_step(self, serial: SerialSteps, x: Tensor, y: Tensor) -> Stats:
        self.finished = self.drain()
        stats = serial.step(self.batch, x, y)
        stats.in_flight = 0
        return stats

    def _enter(self, x: Tensor, y: Tensor, refused: Tensor | None, samples: Tensor | None) -> None:
        source = self._device(x.device)
        ring = self.forward[0]
        if ring is None or ring.source is not source:
            ring = self.forward[0] = Ring(source, self.devices[0], self.depth)
        flags = [] if refused is None else [refused]
        ring.send(self.batch, [y, *flags, x], source.current())
        # The caller may write over the batch. This waits for group 1 to have room, and for nothing behind it.
        ring.wait_sent(self.batch, source.current())
        self.waiting[0] = _Cargo(self.batch, refused is not None, samples=samples)

    def _tick(self) -> Stats | None:
        done, sent = None, 0
        # From the last group to the first: each takes what the one before left at the tick before.
        for k in reversed(range(len(self.workers))):
            cargo, self.waiting[k] = self.waiting[k], None
            if cargo is None:
                continue
            try:
                with self.devices[k].on(self.streams[k]):
                    work = self._train(k, cargo)
            except BaseException:
                self._lose(k, cargo.batch)
                raise
            if work.coded is None:
                event = self.devices[k].event()
                self.devices[k].record(event, self.streams[k])
                done = Stats(cargo.batch, work.losses, 0, 0, (self.devices[k], event))
            else:
                sent += work.coded.nbytes
        if done is not None:
            done.wire_bytes, done.in_flight = sent, self._in_flight()
        return done

    def _lose(self, k: int, batch: int) -> None:
        """Group ``k`` failed. Group 1 comes last in a tick: what has not left it is lost alone, as in lockstep. Behind
        it, the groups before wait for feedback that never comes."""
        if k == 0 and self.waiting[1:2] in ([], [None]):
            self.workers[0].feedback.give_up(batch)
            return
        self.failed = True
        self.waiting = [None] * len(self.workers)

    def _train(self, k: int, cargo: _Cargo) -> Work:
        worker, batch, stream = self.workers[k], cargo.batch, self.streams[k]
        before = self.forward[k]
        assert before is not None, "a cargo has come through it"
        worker.meter.begin(batch)
        inputs = self._inputs(k, cargo, before.receive(batch, stream))
        graphs = self.graphs[k]
        if graphs is not None and graphs.ready(batch, inputs):
            self._wait_sent(k, batch)
            work = graphs.train(batch, inputs)
            updated = True
        else:
            work = train_work(worker, batch, inputs)
            worker.took(batch, inputs.target, work.result)
            updated = False
        before.release(batch, stream)
        self._send(k, cargo, work)
        if worker.owes(batch):
            self._give_back(k, batch, work.result.feedback)
        if not updated:
            worker.update(batch)
        self._learn(k, batch)
        worker.meter.end()
        return work

    def _inputs(self, k: int, cargo: _Cargo, tensors: list[Tensor]) -> Inputs:
        target, *rest = tensors
        losses = rest.pop(0) if k else None
        refused = rest.pop(0) if cargo.refusable else None
        return Inputs(target, losses, refused, tuple(rest), cargo.layout, cargo.version, cargo.samples)

    def _send(self, k: int, cargo: _Cargo, work: Work) -> None:
        worker, ring = self.workers[k], self.forward[k + 1] if k + 1 < len(self.workers) else None
        if ring is None:
            return
        if work.coded is None:
            work.coded = worker.encode(work.result.h)
        else:
            worker.sent(work.coded, work.result.h)
        flags = [] if work.refused is None else [work.refused]
        tensors = [work.target, work.losses, *flags, *work.coded.tensors]
        ring.send(cargo.batch, tensors, self.streams[k])
        coded = work.coded
        self.waiting[k + 1] = _Cargo(cargo.batch, cargo.refusable, coded.layout, coded.version, cargo.samples)

    def _give_back(self, k: int, batch: int, feedback: Tensor) -> None:
        self.workers[k].feedback.owe(batch, feedback)
        (arriving,) = self.backward[k - 1].send(batch, [feedback], self.streams[k])
        self.workers[k - 1].feedback.receive(batch, arriving)

    def _learn(self, k: int, batch: int) -> None:
        """The critic's update. Its stream waits for feedback only now, when it is due."""
        worker, stream = self.workers[k], self.streams[k]
        ring = self.backward[k] if k < len(self.backward) else None
        due = [p.batch for p in worker.feedback.pending if p.batch <= batch - worker.settings.feedback_delay]
        for each in due:
            assert ring is not None, "who keeps slots has a group behind it"
            ring.receive(each, stream)
        graphs = self.graphs[k]
        if graphs is not None and graphs.critic_ready(due):
            graphs.critic()
        else:
            worker.learn(batch)
        for each in due:
            assert ring is not None
            ring.release(each, stream)

    def _wait_sent(self, k: int, batch: int) -> None:
        """A graph writes its outputs where they were: what the batch before it left there has to be read."""
        if k + 1 < len(self.workers):
            ring = self.forward[k + 1]
            assert ring is not None
            ring.wait_sent(batch, self.streams[k])
        if k and self.backward:
            self.backward[k - 1].wait_sent(batch, self.streams[k])

    def _graphs(self, k: int, wanted: bool | None) -> GroupGraphs | None:
        worker = self.workers[k]
        worker.eager_because = None if wanted is False else why_eager(worker, self.devices[k])
        if wanted is False:
            return None
        if worker.eager_because is None:
            return GroupGraphs(worker, self.devices[k], self.streams[k], required=wanted is True)
        if wanted:
            raise ValueError(
                f"graphs=True, but group {k + 1} cannot run as CUDA graphs: {worker.eager_because}"
            )
        return None

    def _device(self, place: torch.device) -> Device:
        if place not in self._driven:
            self._driven[place] = self._drive(place)
        return self._driven[place]

    def _all_streams(self) -> list[tuple[Device, Stream]]:
        found = list(zip(self.devices, self.streams, strict=True))
        for ring in (*self.forward, *self.backward):
            found += [] if ring is None else ring.streams
        return found

    def _in_flight(self) -> int:
        return sum(c is not None for c in self.waiting)


def _join(device: Device, stream: Stream, other: Stream) -> None:
    """``stream`` waits for what ``other`` has been given so far."""
    event = device.event()
    device.record(event, other)
    device.wait(stream, event)
