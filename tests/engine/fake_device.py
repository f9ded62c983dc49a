"""Devices that are none: everything runs at once on the CPU, and is checked as if it ran in streams.

Each operation is noted with the storages it reads and writes and the stream it would be in. Streams and events carry
vector clocks. What a device would get wrong now and then is an error here every time:

- reading what another stream writes, or writing what another stream reads or writes, with no event in between;
- copying memory of the allocator's in another stream without ``keep``;
- the host waiting for a device inside a step (``.item()`` and the like);
- allocating buffers in a step once the pipeline is warm;
- replaying a graph that was not recorded, or recording what cannot be;
- reading a graph's results when a graph that was recorded before it in the same pool has been replayed since: what that
  one writes by the way may lie where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lct_fast.codecs.late import Late
from lct_fast.engine.cuda import streams

Clock = dict[str, int]
# The last one makes a number a tensor on the host, which then is copied while the host waits.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "scalar_tensor")
_ASKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")


class Disorder(AssertionError):
    """Work that a device could do in another order than was meant."""


@dataclass
class _Memory:
    """What has happened to a storage; ``owner`` is the stream whose allocator may take it back, None if nobody's;
    ``spoiled``: another graph may have written over it."""

    storage: Any
    owner: str | None = None
    kept: set[str] = field(default_factory=set)
    written: tuple[str, int] | None = None
    read: Clock = field(default_factory=dict)
    spoiled: bool = False


class Machine(TorchDispatchMode):
    """Devices, streams and memory; a context in which operations are noted.

    Attributes:
        warm: buffers are allocated no more.
        in_step: the host must not wait.
        replays: how many graphs were replayed.
    """

    def __init__(self, count: int = 1, *, peers: bool = True) -> None:
        super().__init__()
        self.peers = peers
        self.devices = [FakeDevice(self, i) for i in range(count)]
        self.clocks: dict[str, Clock] = {}
        self.current: list[str] = ["default"]
        self.memory: dict[int, _Memory] = {}
        self.warm = self.in_step = False
        self.recording: list[_Op] | None = None
        self.replays = 0
        self._made: set[int] = set()

    def ticking(self, stream: str) -> int:
        clock = self.clocks.setdefault(stream, {})
        clock[stream] = clock.get(stream, 0) + 1
        return clock[stream]

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    @contextmanager
    def step(self) -> Iterator[None]:
        """The host must not wait inside."""
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False

    # What an operation does.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if (self.in_step or self.recording is not None) and name in _WAITS:
            if self.recording is not None:
                raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
            raise Disorder(f"the host waits for a device inside a step: {name}")
        inputs, written = _tensors(func, args, kwargs)
        if self.recording is not None:
            self._save(written)
            out = func(*args, **kwargs)
            self.recording.append(_Op(func, args, kwargs, out))
            self._made |= {_key(t) for t in _outputs(out)} - {_key(t) for t in inputs}
            return out
        out = func(*args, **kwargs)
        if name == "copy_":
            # All of it is written over, whatever it was.
            self._of(written[0], None).spoiled = False
        self.note(inputs, written, _outputs(out))
        return out

    def note(self, inputs: list[Tensor], written: list[Tensor], outputs: list[Tensor]) -> None:
        """Checks the order of an operation in the current stream."""
        stream = self.current[-1]
        now, clock = self.ticking(stream), self.clocks[stream]
        known = {_key(t) for t in inputs}
        for t in inputs:
            memory = self._of(t, None)
            self._reads(memory, stream, clock, t)
            if memory.spoiled:
                raise Disorder(f"{stream} uses {_shape(t)}, where another graph of the pool has been since")
            memory.read[stream] = now
        for t in [*written, *(o for o in outputs if _key(o) not in known)]:
            memory = self._of(t, stream)
            self._reads(memory, stream, clock, t)
            for reader, when in memory.read.items():
                if clock.get(reader, 0) < when:
                    raise Disorder(f"{stream} writes over {_shape(t)}, which {reader} may be still to read")
            memory.written, memory.read = (stream, now), {}

    def _reads(self, memory: _Memory, stream: str, clock: Clock, t: Tensor) -> None:
        if memory.written is not None and clock.get(memory.written[0], 0) < memory.written[1]:
            raise Disorder(f"{stream} uses {_shape(t)}, which {memory.written[0]} may be still to write")
        if "copy" in stream and memory.owner not in (None, stream) and stream not in memory.kept:
            raise Disorder(f"{stream} copies {_shape(t)} of {memory.owner}, which may be freed meanwhile")

    def _of(self, t: Tensor, owner: str | None) -> _Memory:
        """``owner`` of memory that is seen for the first time; what was there before is nobody's."""
        storage = t.untyped_storage()
        return self.memory.setdefault(storage._cdata, _Memory(storage, owner))

    # Graphs.

    def _save(self, written: list[Tensor]) -> None:
        """Recording changes nothing, so what is written over has to be put back."""
        for t in written:
            key = _key(t)
            if key not in self._made and key not in self._saved:
                storage = t.untyped_storage()
                self._saved[key] = (storage, storage.clone())

    @contextmanager
    def record(self, ops: list[_Op]) -> Iterator[None]:
        self.recording, self._made = ops, set()
        self._saved: dict[int, tuple[Any, Any]] = {}
        try:
            with ExitStack() as asked:
                for name in _ASKS:
                    asked.enter_context(mock.patch.object(Optimizer, name, _capturable, create=True))
                yield
        finally:
            self.recording = None
            for storage, before in self._saved.values():
                storage.copy_(before)


@dataclass
class _Op:
    func: Any
    args: Any
    kwargs: Any
    out: Any


class FakeGraph(streams.Graph):
    """Records operations and runs them again on the same tensors; ``pool`` has the graphs recorded in it, in order."""

    def __init__(self, machine: Machine, pool: list[FakeGraph]) -> None:
        self.machine, self.pool = machine, pool
        self.ops: list[_Op] | None = None
        self.made: set[int] = set()
        self.stream = ""

    def capture(self, work: Callable[[], Any], stream: str) -> Any:
        ops: list[_Op] = []
        self.stream = stream
        with self.machine.record(ops):
            made = work()
        self.ops, self.made = ops, self.machine._made
        self.pool.append(self)
        return made

    def replay(self) -> None:
        if self.ops is None:
            raise Disorder("a graph is replayed before it was recorded")
        self.machine.replays += 1
        for later in self.pool[self.pool.index(self) + 1 :]:
            later.spoil()
        for op in self.ops:
            with torch.no_grad():
                again = op.func(*op.args, **op.kwargs)
            inputs, _ = _tensors(op.func, op.args, op.kwargs)
            known = {_key(t) for t in inputs}
            for old, new in zip(_outputs(op.out), _outputs(again), strict=True):
                # Views and results of in-place operations are there already.
                if _key(old) not in known and _key(new) != _key(old):
                    with torch.no_grad():
                        old.copy_(new)

    def spoil(self) -> None:
        """A graph that was recorded before this one writes where this one's tensors may be."""
        assert self.ops is not None
        for tensor in (t for op in self.ops for t in _outputs(op.out) if _key(t) in self.made):
            self.machine.note([], [tensor], [])
            self.machine._of(tensor, None).spoiled = True


class FakeDevice(streams.Device):
    """One of a machine's; its tensors are the CPU's."""

    overlaps = True

    def __init__(self, machine: Machine, index: int) -> None:
        super().__init__(torch.device("cpu", index))
        self.machine, self.index, self.count = machine, index, 0

    def stream(self, name: str) -> str:
        self.count += 1
        return f"{name} {self.index}.{self.count}"

    def current(self) -> str:
        return self.machine.current[-1]

    def on(self, stream: str) -> AbstractContextManager[Any]:
        return self.machine.on(stream)

    def event(self) -> Clock:
        return {}

    def record(self, event: Clock, stream: str) -> None:
        event.clear()
        event |= self.machine.clocks.get(stream, {})

    def wait(self, stream: str, event: Clock) -> None:
        _merge(self.machine.clocks.setdefault(stream, {}), event)

    def keep(self, tensor: Tensor, stream: str) -> None:
        self.machine._of(tensor, None).kept.add(stream)

    def empty(self, like: Tensor) -> Tensor:
        if self.machine.warm:
            raise Disorder(f"a buffer for {_shape(like)} is allocated once warm")
        buffer = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        self.machine.memory[_key(buffer)] = _Memory(buffer.untyped_storage())
        return buffer

    def pinned(self, like: Tensor) -> Tensor:
        return self.empty(like)

    def reaches(self, other: streams.Device) -> bool:
        return self is other or self.machine.peers

    def copy(self, target: Tensor, source: Tensor, stream: str, there: str | None = None) -> None:
        for a, b in ((stream, there), (there, stream)):
            if a is not None and b is not None:
                _merge(self.machine.clocks.setdefault(a, {}), self.machine.clocks.setdefault(b, {}))
        with self.machine.on(stream):
            target.copy_(source)
        if there is not None:
            _merge(self.machine.clocks[there], self.machine.clocks[stream])

    def pool(self) -> list[FakeGraph]:
        return []

    def graph(self, pool: list[FakeGraph]) -> FakeGraph:
        return FakeGraph(self.machine, pool)


class FakeLate(Late):
    """A number that was copied behind its stream's work; the host may read it in a step, as it is late."""

    machine: Machine

    def __init__(self, number: Tensor) -> None:
        super().__init__(number.clone())

    def value(self) -> float:
        outside, self.machine.in_step = self.machine.in_step, False
        current = self.machine.current[-1]
        # An event of its own says that it has come.
        memory = self.machine._of(self._host, None)
        if memory.written is not None:
            _merge(self.machine.clocks.setdefault(current, {}), dict([memory.written]))
        try:
            return super().value()
        finally:
            self.machine.in_step = outside


def _capturable(optimizer: Optimizer) -> None:
    """What torch's Adam asks itself while it is recorded on a device."""
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise RuntimeError("Attempting CUDA graph capture, but param_groups' capturable is False.")


def _merge(clock: Clock, other: Clock) -> None:
    for stream, time in other.items():
        clock[stream] = max(clock.get(stream, 0), time)


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _shape(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def _outputs(out: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]


def _tensors(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """All tensors given, and those that are written over."""
    inputs, written = [], []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        found = _outputs(value)
        inputs += found
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += found
        elif func is torch.ops.aten.native_batch_norm.default and argument.name.startswith("running"):
            # Its schema does not say so.
            written += found
    return inputs, written
