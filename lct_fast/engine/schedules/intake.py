"""Takes packets off a link as they come, so that a group at its own pace never makes the one before it wait."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lct_fast.engine.storage.replay import ReplaySlot
from lct_fast.engine.transport.link import TURN, Inbox
from lct_fast.engine.transport.packet import Kind, Packet


class Intake:
    """A thread between a link and a replay buffer.

    Batches to train on go into the buffer at once, where later ones may overwrite them. Everything else is kept for
    the group, and never lost: behind such a packet the thread waits until the group has met it, so what the group
    finds in the buffer then is what came before.

    Args:
        inbox: the link's end.
        keep: writes a batch into the buffer; it copies what it needs.
        take: a slot of the buffer, or None.
        waits: told again and again while the group waits, for what.
    """

    def __init__(
        self,
        inbox: Inbox,
        keep: Callable[[Packet], None],
        take: Callable[[], ReplaySlot | None],
        waits: Callable[[str], None],
    ) -> None:
        self._inbox, self._keep, self._take, self._waits = inbox, keep, take, waits
        self._changed = threading.Condition()
        self._control: Packet | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)

    def start(self) -> None:
        """From here on packets are taken off the link."""
        self._inbox.in_loop = False
        self._thread.start()

    def next(self, works: bool) -> Packet | ReplaySlot:
        """The packet that has to be met, else a slot of the buffer; waits until there is one.

        Args:
            works: whether a slot is wanted. Without, only a packet.

        Raises:
            PeerError, PacketError: as the link's end.
        """
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._control is not None:
                    return self._control
                slot = self._take() if works else None
                if slot is not None:
                    return slot
                self._changed.wait(TURN)
                self._waits("a batch of the group before")

    def met(self) -> None:
        """The group has done what the packet asked; the next may come."""
        with self._changed:
            self._control = None
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            kind = Kind.TRAIN
            while kind is not Kind.STOP:
                packet = self._inbox.get()
                kind = packet.kind
                with self._changed:
                    if kind is Kind.TRAIN:
                        self._keep(packet)
                        self._inbox.release()
                        self._changed.notify_all()
                        continue
                    self._control = packet
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._control is None)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
