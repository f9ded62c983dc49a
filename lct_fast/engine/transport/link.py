"""The two ends of a link over one cut, for groups in different processes.

Each end owns a thread and a fixed number of slots, so that packets move while the group computes. ``put`` waits
for a free slot, ``get`` for a packet: a slow consumer makes its producer wait, nothing grows. A header travels
first, host to host; the consumer posts the receive of the body once the header has told its size.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lct_fast.engine.errors import PeerError, first_line
from lct_fast.engine.meter import Event, GroupMeter
from lct_fast.engine.transport import packet as wire
from lct_fast.engine.transport.heartbeat import Heartbeat
from lct_fast.engine.transport.packet import Kind, Packet

# Seconds after which who waits says so.
TURN = 0.1


class Transport(Protocol):
    """Moves tensors to or from one peer, in order. Each call returns when the tensor may be used again.

    On a CUDA device "may be used" is meant in the order of the current stream.
    """

    def send(self, header: Tensor, body: Tensor | None) -> None: ...

    def receive_header(self, header: Tensor) -> None: ...

    def receive_body(self, body: Tensor) -> None: ...


@dataclass(slots=True)
class _Slot:
    header: Tensor
    body: Tensor
    # When the slot's last user on another stream is done; None on the host.
    event: torch.cuda.Event | None = None
    used: int = 0
    # When it was put into the link, on the first group's clock.
    sent: float = 0.0


@dataclass
class _End(ABC):
    """What both ends share.

    Args:
        transport: to the peer.
        depth: number of slots.
        device: where bodies lie.
        meter: of the group, for the trace; ``row`` names this end there.
        peer: who is there, for errors.
        ahead: seconds this process's clock is ahead of the first group's.
        checksum: whether bodies sent from here carry a sum for the consumer to check.
        heart: told of waits and of a broken link; None where nobody watches.
        peer_rank: the peer's, for ``heart``.
    """

    transport: Transport
    depth: int
    device: torch.device
    meter: GroupMeter
    row: str
    peer: str
    ahead: float = 0.0
    checksum: bool = True
    heart: Heartbeat | None = None
    peer_rank: int = 0
    # Whether the training loop itself waits here; a thread that does it instead says nothing of the loop.
    in_loop: bool = field(default=True, init=False)
    error: BaseException | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        empty = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self.full: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(self.depth):
            self.free.put(_Slot(torch.zeros(wire.WORDS, dtype=torch.int64), empty))
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.thread = threading.Thread(target=self._run, name=self.row, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._on_stream():
                self._loop()
        except BaseException as error:
            self.error = error
            if self.heart is not None and isinstance(error, RuntimeError):
                self.heart.lost(self.peer_rank, error)
            # Wake whoever waits.
            self.free.put(None)
            self.full.put(None)

    @abstractmethod
    def _loop(self) -> None:
        """Moves packets until the end of the stream, in the thread."""

    def _on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()

    def _room(self, slot: _Slot, size: int) -> None:
        """Makes the slot's body hold ``size`` bytes; shapes are agreed, so this happens once."""
        if slot.body.numel() < size:
            slot.body = torch.empty(size, dtype=torch.uint8, device=self.device)

    def _record(self, slot: _Slot) -> None:
        if self.stream is not None:
            slot.event = torch.cuda.Event()
            slot.event.record(torch.cuda.current_stream(self.device))

    def _follow(self, slot: _Slot) -> None:
        """What comes next on the current stream runs after the slot's last use."""
        if slot.event is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.event)

    def _fail(self) -> PeerError:
        cause = self.error
        if isinstance(cause, PeerError):
            return cause
        if cause is not None and not isinstance(cause, RuntimeError):
            raise cause
        why = first_line(cause) if cause is not None else "the link is closed"
        lost = f"lost {self.peer} ({why}): see its own error, then go on from the last checkpoint"
        return PeerError(lost) if self.heart is None else self.heart.verdict(lost)

    def _take(self, source: queue.SimpleQueue[Any], what: str) -> Any:
        """The next of ``source``; the wait for it is told."""
        while True:
            try:
                item = source.get(timeout=TURN)
            except queue.Empty:
                self._turn(what)
                continue
            if self.heart is not None and self.in_loop:
                self.heart.beat()
            return item

    def _turn(self, what: str) -> None:
        if self.heart is not None and self.in_loop:
            self.heart.wait(what)

    def _join(self) -> None:
        """The end of the thread."""
        while self.thread.is_alive():
            self.thread.join(TURN)
            self._turn(f"the end of '{self.row}' with {self.peer}")

    def _trace(self, name: str, start: float, batch: int) -> None:
        self.meter.trace(Event(self.row, name, start, time.perf_counter(), batch))


class Outbox(_End):
    """Sends packets in order."""

    def put(self, packet: Packet) -> None:
        """Copies ``packet`` into a free slot and returns; the thread sends it.

        Waiting for a slot is charged to "wait for room", copying to "pack".

        Raises:
            PeerError: the peer has gone.
        """
        with self.meter.span("wait for room"):
            slot = self._take(self.free, f"room towards {self.peer}")
        if slot is None:
            self.free.put(None)
            raise self._fail()
        with self.meter.span("pack"):
            self._follow(slot)
            slot.used = wire.body_bytes(packet)
            self._room(slot, slot.used)
            wire.write(packet, slot.header, slot.body)
            slot.sent = time.perf_counter() - self.ahead
            self._record(slot)
        self.full.put((slot, packet.kind, packet.batch))

    def close(self) -> None:
        """Waits until all is sent and ends the thread."""
        self.full.put(None)
        self._join()
        if self.error is not None:
            raise self._fail()

    def _loop(self) -> None:
        while (item := self.full.get()) is not None:
            slot, kind, batch = item
            start = time.perf_counter()
            self._follow(slot)
            wire.seal(slot.header, slot.body, slot.sent, self.checksum)
            self.transport.send(slot.header, slot.body[: slot.used] if slot.used else None)
            self._record(slot)
            self._trace(f"send {kind.name.lower()}", start, batch)
            self.free.put(slot)


class Inbox(_End):
    """Receives packets in order."""

    def get(self) -> Packet:
        """The next packet. Its tensors are views of a slot: call ``release`` when they have been used.

        Raises:
            PeerError: the peer has gone. PacketError: what came is no packet.
        """
        item = self._take(self.full, f"{self.row.replace('receive', 'a packet', 1)} from {self.peer}")
        if item is None:
            self.full.put(None)
            raise self._fail()
        slot, packet = item
        self._follow(slot)
        self._slot = slot
        return packet

    def has_next(self) -> bool:
        """Whether ``get`` returns, or raises, at once."""
        return not self.full.empty()

    def release(self) -> None:
        """The tensors of the packet got last are not needed any more."""
        self._record(self._slot)
        self.free.put(self._slot)

    def close(self) -> None:
        """Ends the thread; for after the packet that said STOP."""
        self._join()

    def _loop(self) -> None:
        kind = Kind.TRAIN
        while kind is not Kind.STOP:
            slot = self.free.get()
            if slot is None:
                return
            self.transport.receive_header(slot.header)
            start = time.perf_counter()
            size = wire.read_size(slot.header)
            if size:
                self._room(slot, size)
                self._follow(slot)
                self.transport.receive_body(slot.body[:size])
            packet = wire.read(slot.header, slot.body)
            packet.arrived = time.perf_counter() - self.ahead
            self._record(slot)
            kind = packet.kind
            self._trace(f"receive {kind.name.lower()}", start, packet.batch)
            self.full.put((slot, packet))
