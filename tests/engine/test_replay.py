"""The replay buffer: what it gives when, and that a slot is decoded with what coded it."""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lct_fast import codecs
from lct_fast.codecs import Encoded, Layout
from lct_fast.engine.storage.replay import ReplayBuffer, ReplaySlot

CPU = torch.device("cpu")


def _write(buffer: ReplayBuffer, batch: int, h: Tensor | None = None) -> None:
    h = torch.full((2, 3), float(batch)) if h is None else h
    buffer.write(batch, Encoded((h,), Layout.of(h)), torch.tensor([batch, 0]), torch.tensor([batch, 0.5]))


def _batches(buffer: ReplayBuffer, count: int) -> list[int | None]:
    slots = [buffer.sample() for _ in range(count)]
    return [None if slot is None else slot.batch for slot in slots]


def test_the_least_used_is_taken_and_of_those_the_newest() -> None:
    buffer = ReplayBuffer(3)
    assert _batches(buffer, 1) == [None]
    _write(buffer, 10)
    assert _batches(buffer, 2) == [10, 10]
    _write(buffer, 11)
    _write(buffer, 12)
    # Uses are 2, 0, 0.
    assert _batches(buffer, 5) == [12, 11, 12, 11, 12]
    # 10 goes, the oldest; 11, 12 and 13 have 2, 3 and 0.
    _write(buffer, 13)
    assert _batches(buffer, 6) == [13, 13, 13, 11, 13, 12]
    # 11 goes, the oldest, though it is used least; 12, 13 and 14 have 4, 4 and 0.
    _write(buffer, 14)
    assert _batches(buffer, 7) == [14, 14, 14, 14, 14, 13, 12]


def test_ages_are_those_of_the_writes_whatever_the_batches_are() -> None:
    """Batch numbers may come again and in any order: a group before sends what it samples."""
    buffer = ReplayBuffer(2)
    for batch in (7, 7, 2, 5, 1):
        _write(buffer, batch)
    assert sorted(slot.batch for slot in buffer.slots) == [1, 5]
    first, second = buffer.sample(), buffer.sample()
    assert first is not None and second is not None
    assert (first.batch, buffer.age(first)) == (1, 0)
    assert (second.batch, buffer.age(second)) == (5, 1)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_writes_and_samples_is_that_of_the_definition(seed: int) -> None:
    """Against a model that keeps every batch ever written."""
    draw = random.Random(seed)
    size, limit = draw.randint(1, 5), draw.choice([None, 1, 2, 3])
    buffer = ReplayBuffer(size, limit)
    uses: list[int] = []
    for _ in range(300):
        if draw.random() < 0.4:
            _write(buffer, len(uses))
            uses.append(0)
            continue
        fresh = draw.random() < 0.2
        held = range(max(len(uses) - size, 0), len(uses))
        most = 1 if fresh else limit
        free = [b for b in held if most is None or uses[b] < most]
        least = [b for b in free if uses[b] == min(uses[c] for c in free)]
        expected = max(least, default=None)
        slot = buffer.sample(fresh)
        assert (None if slot is None else slot.batch) == expected
        if expected is not None:
            uses[expected] += 1
    assert len(buffer) == min(size, len(uses)) and buffer.writes == len(uses)


def test_a_limit_makes_the_group_idle_until_something_comes() -> None:
    buffer = ReplayBuffer(2, reuse_limit=2)
    _write(buffer, 0)
    _write(buffer, 1)
    assert _batches(buffer, 6) == [1, 0, 1, 0, None, None]
    _write(buffer, 2)
    assert _batches(buffer, 3) == [2, 2, None]


def test_fresh_takes_nothing_twice() -> None:
    buffer = ReplayBuffer(2)
    _write(buffer, 0)
    assert _batches(buffer, 1) == [0]
    assert buffer.sample(fresh=True) is None
    _write(buffer, 1)
    slot = buffer.sample(fresh=True)
    assert slot is not None and slot.batch == 1
    assert buffer.sample(fresh=True) is None and _batches(buffer, 1) == [1]


def _moving(step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.randn(16, 4, 4, 4, generator=g) + step


def _coded_slots(size: int, steps: int) -> tuple[codecs.Codec, ReplayBuffer, dict[int, Tensor]]:
    """A buffer of vq codes whose codebook moved on several times, and what each batch decodes to on arrival."""
    here, there, prompt = (codecs.build("vq:8,2") for _ in range(3))
    buffer, expected = ReplayBuffer(size), {}
    for step in range(steps):
        encoded = here.encode(_moving(step))
        target = torch.zeros(16, dtype=torch.int64)
        buffer.write(step, there.resolve(encoded), target, torch.zeros(2))
        expected[step] = prompt.decode(encoded)
    return there, buffer, expected


def test_a_slot_is_decoded_with_the_codebook_that_coded_it() -> None:
    decoder, buffer, expected = _coded_slots(40, 40)
    versions = {slot.coded.version for slot in buffer.slots}
    assert len(versions) > 3
    newest = max(buffer.slots, key=lambda slot: slot.written)
    for slot in sorted(buffer.slots, key=lambda slot: -slot.written):
        # From the newest to the oldest, and twice: decoding an old one must not spoil what comes after.
        for _ in range(2):
            assert torch.equal(decoder.decode(slot.coded), expected[slot.batch]), slot.batch
    oldest = min(buffer.slots, key=lambda slot: slot.written)
    mixed = (oldest.coded.tensors[0], *newest.coded.tensors[1:])
    wrong = decoder.decode(replace(oldest.coded, tensors=mixed))
    assert (wrong - expected[oldest.batch]).abs().mean() > 1, "the newest codebook would do as well"


def test_an_old_codebook_does_not_become_the_one_for_what_comes_next() -> None:
    here, there, prompt = (codecs.build("vq:8,2") for _ in range(3))
    first = there.resolve(here.encode(_moving(0)))
    prompt.decode(first)
    step, encoded = 1, here.encode(_moving(1))
    # On to a batch of a later version that brings no codebook.
    while encoded.version == first.version or len(encoded.tensors) > 1:
        assert torch.equal(there.decode(encoded), prompt.decode(encoded))
        encoded = here.encode(_moving(step))
        step += 1
    there.decode(first)
    assert torch.equal(there.decode(encoded), prompt.decode(encoded))


def test_slots_share_a_codebook_which_goes_with_the_last_of_them() -> None:
    _, buffer, _ = _coded_slots(40, 40)
    versions = {slot.coded.version for slot in buffer.slots}
    assert len({id(slot.coded.tensors[1]) for slot in buffer.slots}) == len(versions) < len(buffer)
    oldest = min(versions)
    book = weakref.ref(next(s for s in buffer.slots if s.coded.version == oldest).coded.tensors[1])
    while any(slot.coded.version == oldest for slot in buffer.slots):
        assert book() is not None
        _write(buffer, 0)
    gc.collect()
    assert book() is None


def test_a_codebook_outlives_the_memory_it_came_in() -> None:
    here, there = codecs.build("vq:8,2"), codecs.build("vq:8,2")
    encoded = here.encode(_moving(0))
    expected = codecs.build("vq:8,2").decode(encoded)
    kept = there.resolve(encoded)
    for book in encoded.tensors[1:]:
        book.zero_()
    assert torch.equal(there.decode(kept), expected)


def _same(a: ReplaySlot, b: ReplaySlot) -> bool:
    return (
        (a.batch, a.written, a.uses, a.coded.layout, a.coded.version)
        == (b.batch, b.written, b.uses, b.coded.layout, b.coded.version)
        and all(torch.equal(s, t) for s, t in zip(a.coded.tensors, b.coded.tensors, strict=True))
        and [t.stride() for t in a.coded.tensors] == [t.stride() for t in b.coded.tensors]
        and torch.equal(a.target, b.target)
        and torch.equal(a.losses, b.losses)
    )


def test_a_buffer_goes_on_from_its_state() -> None:
    decoder, buffer, expected = _coded_slots(12, 30)
    for _ in range(5):
        buffer.sample()
    again = ReplayBuffer(12)
    again.load_state(_stored(buffer), CPU)
    assert len(again) == 12 and all(_same(a, b) for a, b in zip(buffer.slots, again.slots, strict=True))
    # Shared codebooks stay shared.
    assert len({id(s.coded.tensors[1]) for s in again.slots}) == len({s.coded.version for s in again.slots})
    for step in range(40):
        if step % 3 == 0:
            _write(buffer, 100 + step)
            _write(again, 100 + step)
        a, b = buffer.sample(), again.sample()
        assert a is not None and b is not None and _same(a, b)
        if a.batch < 100:
            assert torch.equal(decoder.decode(b.coded), expected[b.batch])


def test_strides_come_back() -> None:
    buffer, again = ReplayBuffer(3), ReplayBuffer(3)
    for batch, order in enumerate([(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)]):
        h = torch.randn(2, 3, 4, 5).permute(order).contiguous()
        _write(buffer, batch, h.permute([order.index(i) for i in range(4)]))
    again.load_state(_stored(buffer), CPU)
    assert all(_same(a, b) for a, b in zip(buffer.slots, again.slots, strict=True))
    assert len({s.coded.tensors[0].stride() for s in again.slots}) == 3


def _stored(buffer: ReplayBuffer) -> dict[str, object]:
    """As a checkpoint keeps it: tensors lose their strides, and stay as they were when the buffer goes on."""
    state = buffer.state()
    state["tensors"] = [t.contiguous().clone() for t in state["tensors"]]
    return state


def test_refusals() -> None:
    with pytest.raises(ValueError, match="buffer: expected a number of slots >= 1, got 0"):
        ReplayBuffer(0)
    with pytest.raises(ValueError, match="reuse_limit: expected a number >= 1 or None, got 0"):
        ReplayBuffer(1, 0)
    buffer = ReplayBuffer(2)
    _write(buffer, 0)
    _write(buffer, 1)
    with pytest.raises(ValueError, match="buffer: 2 slots were saved, this run has 1"):
        ReplayBuffer(1).load_state(buffer.state(), CPU)
