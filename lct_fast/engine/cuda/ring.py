"""Slots between two groups of one process, on the devices of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lct_fast.codecs import dense
from lct_fast.engine.cuda.streams import Device, Event, Stream


@dataclass(slots=True)
class _Slot:
    """Buffers of one batch, and what has been done with them.

    ``tensors`` and, on the way through the host, ``stops``: those in use; ``buffers`` and ``pinned``: those that stay.
    ``made``: the source has computed; ``sent``: its tensors have been read; ``arrived``: they are in ``tensors``;
    ``read``: the target needs them no more.
    """

    made: Event
    sent: Event
    arrived: Event
    read: Event
    tensors: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)
    pinned: list[Tensor] = field(default_factory=list)
    stops: list[Tensor] = field(default_factory=list)


class Ring:
    """Carries tensors from one group to another, batch t in slot t modulo ``depth``.

    It has a copy stream of its own at each end, so that no copy waits for one that goes elsewhere. Between devices
    that cannot reach each other copies stop in pinned memory of the host. Buffers are allocated when a shape is first
    seen, for all slots.

    Args:
        source, target: the devices.
        depth: slots.
    """

    def __init__(self, source: Device, target: Device, depth: int) -> None:
        self.source, self.target, self.depth = source, target, depth
        # Memory of the host is read from the target's side.
        self.sender = source if source.overlaps else target
        self.slots = [
            _Slot(source.event(), self.sender.event(), target.event(), target.event()) for _ in range(depth)
        ]
        self.sends = self.sender.stream("copy")
        self.receives = self.sends if self.sender.device == target.device else target.stream("copy")
        self.staged = source.overlaps and target.overlaps and not source.reaches(target)

    @property
    def streams(self) -> list[tuple[Device, Stream]]:
        """Those of the ring, with their devices."""
        return [(self.sender, self.sends), (self.target, self.receives)]

    def send(self, batch: int, tensors: Sequence[Tensor], made: Stream) -> list[Tensor]:
        """Starts the transfer of ``tensors``, which stream ``made`` of the source computes.

        Returns where they arrive; to be read between ``receive`` and ``release`` of the same batch.
        """
        slot = self.slots[batch % self.depth]
        if not self.target.overlaps:
            # Everything here is done when it returns; a copy from a device waits for it.
            slot.tensors = [t.to(self.target.device) for t in tensors]
            return slot.tensors
        tensors = [dense(t) for t in tensors]
        self._allocate(slot, tensors)
        if self.source.overlaps:
            self.source.record(slot.made, made)
            self.source.wait(self.sends, slot.made)
        if self.staged:
            self._stage(slot, tensors)
        else:
            self.sender.wait(self.sends, slot.read)
            for source, buffer in zip(tensors, slot.tensors, strict=True):
                self.source.keep(source, self.sends)
                there = None if self.receives is self.sends else self.receives
                self.sender.copy(buffer, source, self.sends, there)
            self.sender.record(slot.arrived, self.sends)
            self.sender.record(slot.sent, self.sends)
        return slot.tensors

    def receive(self, batch: int, stream: Stream) -> list[Tensor]:
        """What arrives of ``batch``; ``stream`` of the target waits for it."""
        slot = self.slots[batch % self.depth]
        self.target.wait(stream, slot.arrived)
        for tensor in slot.tensors:
            self.target.keep(tensor, stream)
        return slot.tensors

    def release(self, batch: int, stream: Stream) -> None:
        """What ``stream`` has been given so far is the last that reads the slot of ``batch``."""
        self.target.record(self.slots[batch % self.depth].read, stream)

    def wait_sent(self, batch: int, stream: Stream) -> None:
        """``stream`` of the source waits until what was last sent through the slot of ``batch`` has been read there:
        then it may be written over."""
        self.source.wait(stream, self.slots[batch % self.depth].sent)

    def _stage(self, slot: _Slot, tensors: Sequence[Tensor]) -> None:
        # The pinned buffers are free when what they held has arrived.
        self.source.wait(self.sends, slot.arrived)
        for source, stop in zip(tensors, slot.stops, strict=True):
            self.source.keep(source, self.sends)
            self.source.copy(stop, source, self.sends)
        self.source.record(slot.sent, self.sends)
        self.target.wait(self.receives, slot.sent)
        self.target.wait(self.receives, slot.read)
        for stop, buffer in zip(slot.stops, slot.tensors, strict=True):
            self.target.copy(buffer, stop, self.receives)
        self.target.record(slot.arrived, self.receives)

    def _allocate(self, slot: _Slot, tensors: Sequence[Tensor]) -> None:
        """Gives ``slot.tensors`` a buffer for each of ``tensors``."""
        for i in range(len(slot.buffers), len(tensors)):
            for each in self.slots:
                each.buffers.append(self.target.empty(tensors[i]))
                if self.staged:
                    each.pinned.append(self.source.pinned(tensors[i]))
        slot.tensors, slot.stops = slot.buffers[: len(tensors)], slot.pinned[: len(tensors)]
        for i, t in enumerate(tensors):
            if not _alike(slot.buffers[i], t):
                # A batch of another size, say the last of an epoch: it gets memory for itself.
                with self.target.on(self.receives):
                    slot.tensors[i] = self.target.empty(t)
                if self.staged:
                    slot.stops[i] = self.source.pinned(t)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
