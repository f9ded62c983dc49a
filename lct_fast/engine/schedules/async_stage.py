"""Asynchronous over processes: one group a process, each at its own pace out of a replay buffer (arXiv 2106.06401)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from lct_fast.codecs import CodecError, Encoded
from lct_fast.engine.errors import PacketError
from lct_fast.engine.schedules.intake import Intake
from lct_fast.engine.schedules.paced_group import PacedGroup
from lct_fast.engine.schedules.schedule import Async
from lct_fast.engine.schedules.stage import Stage
from lct_fast.engine.stats import Event, Stats
from lct_fast.engine.transport.packet import Kind, Packet
from lct_fast.engine.transport.ranks import Ranks
from lct_fast.engine.worker import Worker


class AsyncStage(Stage):
    """One group in its own process, which trains on what its buffer holds and waits only while that is nothing.

    Evaluation, marks, learning rates and the end travel in the stream and are met in order, as in ``Stage``; batches
    may be overwritten before they are used. A group that has made its updates forwards, in evaluation mode, until all
    groups behind it have; that they have, it hears from the group behind, in the one packet that travels backward.

    Args:
        worker: the group.
        ranks: where it stands.
        pace: of the run, checked.

    Attributes:
        batch: how many batches group 1 has taken; elsewhere, as of the latest packet that was met.
    """

    answers = True

    def __init__(self, worker: Worker, ranks: Ranks, pace: Async) -> None:
        super().__init__(worker, ranks)
        self.group = PacedGroup(worker, pace, ranks.size)
        self._behind_finished = self.last
        self._answered = False
        self._evaluating = False

    @property
    def finished(self) -> bool:
        """Whether this group and all behind it have made their updates."""
        if not self._behind_finished and self.feedback is not None and self.feedback.has_next():
            self.feedback.get()
            self.feedback.release()
            self._behind_finished = True
        return self._behind_finished and not self.group.learns

    def step(self, x: Tensor, y: Tensor, samples: Tensor | None = None) -> Stats:
        """Train on a batch, or only forward it; the other groups go on on their own."""
        if self._behind_finished and not self.group.learns:
            raise RuntimeError(
                f"every group has trained on its {self.group.steps} batches: end with trainer.finished"
            )
        self.worker.meter.begin(self.group.updates)
        sent = self._work(self.batch, x, y)
        self.batch += 1
        return Stats(self.batch - 1, self.group.losses.clone(), sent, 0)

    def events(self) -> Iterator[Event]:
        """As ``Stage.events``; a ``Stats`` for every batch this group trains on, numbered by its own updates."""
        inbox, group, meter = self.inbox, self.group, self.worker.meter
        assert inbox is not None, "the first group's process drives; it has no stream to follow"
        # Not before: until here a checkpoint may be loaded.
        intake = Intake(inbox, self._keep, group.take, self.ranks.heart.wait)
        intake.start()
        while True:
            finished = self.finished
            if finished:
                self._end_answers()
            meter.begin(group.updates)
            with meter.span("wait for input"):
                item = intake.next(works=not finished and not self._evaluating)
            if isinstance(item, Packet):
                self.batch = item.batch + 1
                self._evaluating = item.kind is Kind.EVALUATE
                yield from self._meet(item)
                intake.met()
                if item.kind is Kind.STOP:
                    return
                continue
            learns = group.learns
            sent = self._work(item.batch, self.worker.decode(item.coded), item.target)
            if learns:
                assert group.buffer is not None
                yield Stats(group.updates - 1, group.losses.clone(), sent, len(group.buffer))

    def _work(self, batch: int, h: Tensor, target: Tensor) -> int:
        """One turn of the group; the bytes it sent."""
        group, sent = self.group, 0

        def send(h: Tensor) -> None:
            nonlocal sent
            sent = self._send(batch, h, target, group.losses)

        group.work(h, target, None if self._behind_finished else send)
        self.ranks.heart.done(batch)
        self.worker.meter.end()
        return sent

    def _keep(self, packet: Packet) -> None:
        """Into the buffer, out of the link's memory."""
        coded = self._coded(packet)
        target, losses = (t.clone() for t in packet.tensors)
        copied = Encoded(tuple(t.clone() for t in coded.tensors), coded.layout, coded.version)
        try:
            self.group.keep(packet.batch, copied, target, losses)
        except CodecError as error:
            raise PacketError(f"batch {packet.batch}: {error}") from None

    def _end_answers(self) -> None:
        if not self._answered:
            super()._end_answers()
        self._answered = True
