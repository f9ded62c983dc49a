"""The ends of a link, over a transport in memory: order, room, errors, and what the trace says of it."""

import queue
import threading
import time

import pytest
import torch
from torch import Tensor

from lct_fast.engine import PacketError, PeerError
from lct_fast.engine.meter import GroupMeter
from lct_fast.engine.transport.link import Inbox, Outbox
from lct_fast.engine.transport.packet import Kind, Packet


class Pipe:
    """Hands tensors over as a socket would: a send is over when the receiver has taken all of it."""

    def __init__(self) -> None:
        self.tensors: queue.Queue[Tensor | Exception] = queue.Queue()

    def send(self, header: Tensor, body: Tensor | None) -> None:
        for t in (header, body):
            if t is not None:
                self.tensors.put(t)
        self.tensors.join()

    def receive_header(self, header: Tensor) -> None:
        self._take(header)

    def receive_body(self, body: Tensor) -> None:
        self._take(body)

    def _take(self, into: Tensor) -> None:
        got = self.tensors.get()
        if isinstance(got, Exception):
            raise got
        assert got.shape == into.shape and got.dtype == into.dtype
        into.copy_(got)
        self.tensors.task_done()


def _ends(depth: int = 2) -> tuple[Outbox, Inbox, Pipe]:
    pipe, cpu = Pipe(), torch.device("cpu")
    outbox = Outbox(pipe, depth, cpu, GroupMeter(0), "send", "the process of group 2")
    return outbox, Inbox(pipe, depth, cpu, GroupMeter(1), "receive", "the process of group 1"), pipe


def test_packets_arrive_in_order_unchanged_whatever_their_size() -> None:
    outbox, inbox, _ = _ends()
    sizes = [3, 500, 1, 0, 64, 500]
    sent = [torch.randn(n, 4) for n in sizes]

    def produce() -> None:
        for t, x in enumerate(sent):
            outbox.put(Packet(Kind.TRAIN, t, [x, torch.arange(len(x))]))
            x.fill_(float("nan"))  # the copy has left; what happens to the original is of no matter
            outbox.put(Packet(Kind.MARK, t, value=-t))
        outbox.put(Packet(Kind.STOP, len(sent)))

    expected = [x.clone() for x in sent]
    thread = threading.Thread(target=produce)
    thread.start()
    for t, x in enumerate(expected):
        packet = inbox.get()
        assert (packet.kind, packet.batch) == (Kind.TRAIN, t)
        assert torch.equal(packet.tensors[0], x) and torch.equal(packet.tensors[1], torch.arange(len(x)))
        assert packet.sent <= packet.arrived <= time.perf_counter()
        inbox.release()
        mark = inbox.get()
        assert (mark.kind, mark.batch, mark.value) == (Kind.MARK, t, -t)
        inbox.release()
    assert inbox.get().kind is Kind.STOP
    thread.join()
    outbox.close()
    inbox.close()
    assert not outbox.thread.is_alive() and not inbox.thread.is_alive()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_producer_gets_as_far_as_the_slots_and_waits(depth: int) -> None:
    outbox, inbox, _ = _ends(depth)
    done = []

    def produce() -> None:
        for t in range(20):
            outbox.put(Packet(Kind.TRAIN, t, [torch.full((8,), float(t))]))
            done.append(t)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    farthest = 0
    for t in range(20):
        time.sleep(0.01)
        farthest = max(farthest, len(done) - t)
        assert inbox.get().tensors[0][0] == t
        inbox.release()
    thread.join()
    # Its own slots and the consumer's.
    assert depth < farthest <= 2 * depth
    assert inbox.free.qsize() + inbox.full.qsize() <= depth and outbox.free.qsize() <= depth


def test_slots_are_allocated_once() -> None:
    outbox, inbox, _ = _ends()
    seen = set()
    for t in range(12):
        outbox.put(Packet(Kind.TRAIN, t, [torch.zeros(100)]))
        seen.add(inbox.get().tensors[0].data_ptr())
        inbox.release()
    assert len(seen) == 2


def test_what_breaks_a_link_is_told_to_who_uses_it() -> None:
    outbox, inbox, pipe = _ends()
    pipe.tensors.put(RuntimeError("Connection closed by peer [127.0.0.1]:1\nmore"))
    for _ in range(2):
        with pytest.raises(
            PeerError, match=r"lost the process of group 1 \(Connection closed by peer .127.0.0.1.:1\)"
        ):
            inbox.get()
    _, inbox, pipe = _ends()
    pipe.tensors.put(torch.zeros_like(inbox.free.get().header))  # type: ignore[union-attr]
    with pytest.raises(PacketError, match="expected format"):
        inbox.get()

    def broken(header: Tensor, body: Tensor | None) -> None:
        raise RuntimeError("Broken pipe")

    pipe = Pipe()
    pipe.send = broken  # type: ignore[method-assign]
    outbox = Outbox(pipe, 2, torch.device("cpu"), GroupMeter(0), "send", "the process of group 2")
    with pytest.raises(PeerError, match=r"lost the process of group 2 \(Broken pipe\)"):
        for t in range(5):
            outbox.put(Packet(Kind.MARK, t))
    with pytest.raises(PeerError):
        outbox.close()


@pytest.mark.parametrize("checksum", [True, False])
def test_a_byte_that_changes_on_its_way_is_seen_where_bodies_are_summed(checksum: bool) -> None:
    outbox, inbox, pipe = _ends()
    outbox.checksum = checksum
    send = pipe.send

    def damaged(header: Tensor, body: Tensor | None) -> None:
        if body is not None:
            body[5] ^= 4
        send(header, body)

    pipe.send = damaged  # type: ignore[method-assign]
    outbox.put(Packet(Kind.TRAIN, 6, [torch.ones(9)]))
    if checksum:
        with pytest.raises(PacketError, match="packet body of batch 6: its sum is"):
            inbox.get()
    else:
        assert inbox.get().tensors[0][1] != 1


def test_the_trace_has_sends_and_receives_of_their_own_time() -> None:
    outbox, inbox, _ = _ends()
    for meter in (outbox.meter, inbox.meter):
        meter.begin(0)
        meter.end()
    outbox.put(Packet(Kind.TRAIN, 4, [torch.zeros(1000)]))
    time.sleep(0.01)
    inbox.get()
    inbox.release()
    outbox.put(Packet(Kind.STOP, 4))
    inbox.get()
    outbox.close()
    (sent, _), (received, _) = (
        [e for e in end.meter.events if e.row in ("send", "receive")] for end in (outbox, inbox)
    )
    assert (sent.name, sent.batch, received.name) == ("send train", 4, "receive train")
    assert sent.start <= received.start <= received.end <= time.perf_counter()
