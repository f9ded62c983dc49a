"""Pipelined over processes: one group a process, each at its own batch.

The first group's process is the driver: what it does (batches, evaluation, marks, learning rates, the end) goes down
the stream, and every other process follows it, group after group, so nothing is drained for any of it. A group
waits only for its input, for room in the link, and for feedback that is later than the delay allows.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lct_fast.codecs import Codec, CodecError, Encoded, Identity, dense
from lct_fast.engine.errors import PacketError
from lct_fast.engine.network.exits import Evaluation, summed
from lct_fast.engine.schedules.serial import count_step
from lct_fast.engine.schedules.serial_stage import SerialStage
from lct_fast.engine.stats import Event, Mark, Stats
from lct_fast.engine.transport import packet as wire
from lct_fast.engine.transport.link import Inbox, Outbox
from lct_fast.engine.transport.packet import Kind, Packet
from lct_fast.engine.transport.ranks import ProcessTransport, Ranks
from lct_fast.engine.transport.replicas import COMPARE_EVERY
from lct_fast.engine.worker import Worker

# Slots at each end of a link: one in use, one that fills or empties meanwhile.
DEPTH = 2
_FORWARD, _BACKWARD = 0, 1


class Stage:
    """One group in its own process.

    Args:
        worker: the group.
        ranks: where it stands.

    Attributes:
        batch: number of the next batch.
    """

    # Whether something travels backward whatever the method.
    answers = False

    def __init__(self, worker: Worker, ranks: Ranks) -> None:
        self.worker, self.ranks = worker, ranks
        self.batch = 0
        # Whether the stream is over: nobody is there to hear what comes after.
        self.ended = False
        self.first, self.last = ranks.rank == 0, ranks.rank == ranks.size - 1
        self._scores = torch.zeros(ranks.size, 4, dtype=torch.float64)
        # Feedback of at most this many batches can have come and not be due yet.
        early = max(worker.settings.feedback_delay, 1) + 1
        answers = worker.settings.method.uses_feedback or self.answers
        before, behind = ranks.rank - 1, ranks.rank + 1
        self.inbox = None if self.first else Inbox(**self._end(before, _FORWARD, DEPTH, "receive"))
        self.outbox = None if self.last else Outbox(**self._end(behind, _FORWARD, DEPTH, "send"))
        self.feedback: Inbox | None = None
        self.owing: Outbox | None = None
        if answers and not self.last:
            self.feedback = Inbox(**self._end(behind, _BACKWARD, early, "receive feedback"))
        if answers and not self.first:
            self.owing = Outbox(**self._end(before, _BACKWARD, DEPTH, "send feedback"))
        hybrid = worker.settings.hybrid
        self.serial = SerialStage(worker, ranks, hybrid) if hybrid else None
        atexit.register(self._abandon)

    def _end(self, peer: int, direction: int, depth: int, row: str) -> dict[str, Any]:
        """The arguments of this process's end of a link to ``peer``."""
        checksum = self.worker.settings.checksum
        data = self.ranks.backward if direction == _BACKWARD else self.ranks.forward
        return {
            "transport": ProcessTransport(self.ranks.base + peer, data, self.ranks.control, direction),
            "depth": depth,
            "device": self.worker.device,
            "meter": self.worker.meter,
            "row": row,
            "peer": f"the process of group {peer + 1} ({self.ranks.places[peer]})",
            "ahead": self.ranks.ahead,
            "checksum": self.worker.device.type == "cpu" if checksum is None else checksum,
            "heart": self.ranks.heart,
            "peer_rank": self.ranks.base + peer,
        }

    # What the first group's process does.

    def step(self, x: Tensor, y: Tensor, samples: Tensor | None = None) -> Stats:
        """Train on a batch; the other groups follow on their own."""
        worker = self.worker
        worker.meter.begin(self.batch)
        if self.serial is not None and self.serial.hybrid.is_serial(self.batch):
            x = x.to(worker.device).contiguous()
            return self._serial_step(self.serial, x, x[:0], y.to(worker.device))
        losses = torch.full((self.ranks.size,), float("nan"), device=worker.device)
        return self._train(worker.place(x), y.to(worker.device), losses, samples)

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]], coded: bool) -> Evaluation | None:
        """Sends the batches down the stream; the last group's process gets the result."""
        for x, y in batches:
            h, target = self.worker.place(x), y.to(self.worker.device)
            self._evaluate(h, target, self._no_scores(h.device), coded)
        return self._evaluated()

    def mark(self, code: int) -> None:
        """Sends a mark; every process gets it behind the same batch."""
        self._forward(Packet(Kind.MARK, self.batch - 1, value=code))

    def set_learning_rate(self, rate: float) -> None:
        """All groups' optimisers, behind the same batch."""
        self.worker.set_learning_rate(rate)
        self._forward(Packet(Kind.LEARNING_RATE, self.batch - 1, value=wire.float_bits(rate)))

    def begin_sequence(self) -> None:
        """Layers that carry state begin afresh, in all groups, behind the same batch."""
        self.worker.begin_sequence()
        self._forward(Packet(Kind.SEQUENCE, self.batch - 1))

    def flush(self) -> None:
        """Every critic learns from all feedback it is owed."""
        self._forward(Packet(Kind.FLUSH, self.batch - 1))
        self._flush()

    def stop(self) -> None:
        """Ends the stream; every process's ``events`` ends."""
        self._forward(Packet(Kind.STOP, self.batch - 1))
        self._close()

    # What the other processes do.

    def events(self) -> Iterator[Event]:
        """Follows the stream to its end: trains, evaluates, and yields what happened.

        A mark is passed on when the caller asks for the next event, so what the caller does at a mark is done
        before the group behind sees it.
        """
        inbox = self.inbox
        assert inbox is not None, "the first group's process drives; it has no stream to follow"
        worker = self.worker
        while True:
            meter = worker.meter
            meter.begin(self.batch)
            with meter.span("wait for input") as waited:
                packet = inbox.get()
            if packet.kind is Kind.TRAIN:
                self._expect(packet)
                meter.add_exposed(self._exposed(packet, waited.start))
                target, losses, *samples = (packet.tensors[0], *(t.clone() for t in packet.tensors[1:]))
                yield self._train(worker.place(self._decode(packet)), target, losses, *samples)
                continue
            if packet.kind is Kind.SERIAL:
                self._expect(packet)
                target, example = (t.clone() for t in packet.tensors)
                inbox.release()
                yield self._serial_step(self._serial_stage(), None, example, target)
                continue
            yield from self._meet(packet)
            if packet.kind is Kind.STOP:
                return

    # What all do.

    def _meet(self, packet: Packet) -> Iterator[Event]:
        """Does what a packet asks that is no batch to train on, and passes it on."""
        assert self.inbox is not None
        if packet.kind is Kind.EVALUATE:
            target, scores = packet.tensors
            h = self.worker.place(self._decode(packet))
            self._evaluate(h, target, scores.clone(), bool(packet.value))
            return
        self.inbox.release()
        if packet.kind is Kind.EVALUATED:
            result = self._evaluated()
            if result is not None:
                yield result
        elif packet.kind is Kind.MARK:
            yield Mark(packet.batch, packet.value)
            self._forward(packet)
        elif packet.kind is Kind.LEARNING_RATE:
            self.worker.set_learning_rate(wire.bits_float(packet.value))
            self._forward(packet)
        elif packet.kind is Kind.SEQUENCE:
            self.worker.begin_sequence()
            self._forward(packet)
        elif packet.kind is Kind.FLUSH:
            self._forward(packet)
            self._flush()
        else:
            self._forward(packet)
            self._close()

    def _train(self, h: Tensor, target: Tensor, losses: Tensor, samples: Tensor | None = None) -> Stats:
        worker, batch = self.worker, self.batch
        meter = worker.meter
        result = worker.train(batch, h, target, samples=samples)
        losses[worker.index] = worker.mean(result.loss, target)
        sent = self._send(batch, result.h, target, losses, samples)
        if worker.owes(batch):
            assert self.owing is not None
            feedback = dense(result.feedback)
            self.owing.put(Packet(Kind.FEEDBACK, batch, [feedback]))
            worker.feedback.owe(batch, feedback)
        # The slot is free from here: nothing below reads the input.
        if self.inbox is not None:
            self.inbox.release()
        worker.update(batch)
        self._take_feedback(batch - worker.settings.feedback_delay)
        worker.learn(batch)
        self.ranks.heart.done(batch)
        self.batch += 1
        if self.batch % COMPARE_EVERY == 0:
            worker.compare_codebooks()
        meter.end()
        return Stats(batch, losses, sent, len(worker.feedback.pending))

    def _serial_step(self, serial: SerialStage, x: Tensor | None, example: Tensor, target: Tensor) -> Stats:
        """A step with all other processes at once.

        Targets go down the stream, as only the first group's process reads the data. With them goes the next
        group's input without rows, so that it knows what shape and dtype will come.
        """
        worker, batch = self.worker, self.batch
        start = time.perf_counter()
        example = serial.agree(len(target), example)
        if self.outbox is not None:
            self.outbox.put(Packet(Kind.SERIAL, batch, [dense(target), dense(example)]))
        loss, sent = serial.step(batch, x, target)
        worker.update(batch)
        worker.forget_samples()
        self._take_feedback(batch - worker.settings.feedback_delay)
        worker.learn(batch)
        count_step(worker, batch, target, start)
        self.ranks.heart.done(batch)
        self.batch += 1
        losses = torch.full((self.ranks.size,), float("nan"), device=worker.device)
        if loss is not None:
            losses[-1] = loss
        return Stats(batch, losses, sent, len(worker.feedback.pending))

    def _serial_stage(self) -> SerialStage:
        if self.serial is None:
            raise PacketError(
                f"group {self.worker.index + 1} got a serial batch, but its own schedule has none: give every "
                f"process the same schedule"
            )
        return self.serial

    def _send(
        self, batch: int, h: Tensor, target: Tensor, losses: Tensor, samples: Tensor | None = None
    ) -> int:
        if self.outbox is None:
            return 0
        assert self.worker.encoder is not None
        coded = self.worker.encode(h)
        codec = wire.codec_number(self.worker.encoder.name)
        tensors = [dense(target), losses, *([] if samples is None else [samples.to(losses.device)])]
        self.outbox.put(Packet(Kind.TRAIN, batch, tensors, coded=coded, codec=codec))
        return coded.nbytes

    def _decoder(self, packet: Packet) -> Codec:
        if packet.kind is Kind.EVALUATE and not packet.value:
            return Identity()
        assert self.worker.decoder is not None
        return self.worker.decoder

    def _coded(self, packet: Packet) -> Encoded:
        """What travels of a tensor, if the codec that made it is the one this process decodes with."""
        decoder = self._decoder(packet)
        if packet.coded is None or packet.codec != wire.codec_number(decoder.name):
            raise PacketError(
                f"packet codec: expected {decoder.name}, got another (number {packet.codec:#x}); give every process "
                f"the same codec"
            )
        return packet.coded

    def _decode(self, packet: Packet) -> Tensor:
        try:
            return self.worker.decode(self._coded(packet), self._decoder(packet))
        except CodecError as error:
            raise PacketError(f"batch {packet.batch}: {error}") from None

    def _take_feedback(self, through: int) -> None:
        """Waits for the feedback that is due; what came early stays in its slot."""
        worker = self.worker
        for batch in worker.feedback.awaited(through):
            assert self.feedback is not None
            with worker.meter.span("wait for feedback"):
                packet = self.feedback.get()
            if packet.kind is not Kind.FEEDBACK or packet.batch != batch:
                raise PacketError(
                    f"feedback: expected that of batch {batch}, got {packet.kind.name} {packet.batch}"
                )
            worker.feedback.receive(batch, packet.tensors[0].clone())
            self.feedback.release()

    def _no_scores(self, device: torch.device) -> Tensor:
        return torch.zeros(self.ranks.size, 4, dtype=torch.float64, device=device)

    def _evaluate(self, h: Tensor, target: Tensor, scores: Tensor, coded: bool) -> None:
        h, scores[self.worker.index] = self.worker.evaluate(h, target)
        if self.outbox is None:
            self._scores += scores.cpu()
        else:
            encoder = self.worker.encoder if coded else Identity()
            assert encoder is not None
            self.outbox.put(
                Packet(
                    Kind.EVALUATE,
                    self.batch - 1,
                    [dense(target), scores],
                    int(coded),
                    encoder.encode(h, learn=False),
                    wire.codec_number(encoder.name),
                )
            )
        if self.inbox is not None:
            self.inbox.release()

    def _evaluated(self) -> Evaluation | None:
        self.worker.end_evaluation()
        self.worker.read_codebook(self.batch)
        self._forward(Packet(Kind.EVALUATED, self.batch - 1))
        if not self.last:
            return None
        result = summed(self._scores)
        self._scores.zero_()
        return result

    def _flush(self) -> None:
        self._take_feedback(self.batch)
        self.worker.flush(self.batch)

    def _forward(self, packet: Packet) -> None:
        if self.outbox is not None:
            self.outbox.put(Packet(packet.kind, packet.batch, value=packet.value))

    def _end_answers(self) -> None:
        if self.owing is not None:
            self.owing.put(Packet(Kind.STOP, self.batch - 1))

    def _close(self) -> None:
        self._end_answers()
        for end in (self.outbox, self.owing, self.inbox, self.feedback):
            if end is not None:
                end.close()
        self.ended = True
        atexit.unregister(self._abandon)
        self.ranks.heart.end()

    def _abandon(self) -> None:
        """Ends a process whose stream has not ended: at once, as threads of links that wake up in an interpreter that
        is being taken down abort it (pthread_exit through C++ frames, up to Python 3.12)."""
        error = getattr(sys, "last_value", None)
        if error is None:
            error = RuntimeError("this process ended before trainer.stop()")
            print(f"lct_fast: {error}", file=sys.stderr)
        self.ranks.heart.report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _expect(self, packet: Packet) -> None:
        if packet.batch != self.batch:
            raise PacketError(
                f"group {self.worker.index + 1} expected batch {self.batch}, got {packet.batch}: the processes "
                f"started from different checkpoints"
            )

    def _exposed(self, packet: Packet, waiting_since: float) -> float:
        """Of the wait for this packet, the seconds it was already on its way."""
        ahead = self.ranks.ahead
        if packet.arrived + ahead <= waiting_since:
            return 0.0
        return max(0.0, time.perf_counter() - max(waiting_since, packet.sent + ahead))
