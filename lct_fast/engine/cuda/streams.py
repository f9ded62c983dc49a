"""What the engine asks of a device: streams, events, copies between devices, buffers and graphs.

Work is started in streams and not waited for; events order one stream behind another. Only ``CudaDevice`` knows
torch.cuda. On the host everything is done at once and in order, so all of it does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

# A stream or an event; what it is, is its device's affair.
Stream = Any
Event = Any


class Graph:
    """Work that is recorded once and started again with one call."""

    def capture(self, work: Callable[[], Any], stream: Stream) -> Any:
        """Records what ``work`` starts, without running it, and returns what it returns.

        Tensors made inside stay where they are: each replay writes them anew.

        Raises:
            RuntimeError: something in it cannot be recorded, such as a wait of the host for the device.
        """
        raise NotImplementedError(f"{type(self).__name__} records no graphs")

    def replay(self) -> None:
        """Starts the recorded work in the current stream."""
        raise NotImplementedError(f"{type(self).__name__} records no graphs")


class Device:
    """The host: what is started is done when the call returns.

    Attributes:
        overlaps: whether work goes on behind the back of the host, so that streams and events mean something.
    """

    overlaps = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stream(self, name: str) -> Stream:
        """A new stream; ``name`` says what for."""
        return None

    def current(self) -> Stream:
        """The stream that the caller's own work on this device goes into."""
        return None

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """What is started inside goes into ``stream``."""
        return nullcontext()

    def event(self) -> Event:
        """A new event. Waiting for one that was never recorded is no wait."""
        return None

    def record(self, event: Event, stream: Stream) -> None:
        """``event`` now stands for all that ``stream`` has been given so far."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What ``stream`` is given from now on starts when ``event`` has come; the host goes on."""

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        """The memory of ``tensor`` stays its own until what ``stream`` has been given by then is done."""

    def empty(self, like: Tensor) -> Tensor:
        """Uninitialised memory on this device, with shape, strides and dtype of ``like``."""
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self.device)

    def pinned(self, like: Tensor) -> Tensor:
        """The same on the host, where this device can reach it by itself."""
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)

    def reaches(self, other: Device) -> bool:
        """Whether copies to ``other`` need no stop on the host."""
        return True

    def copy(self, target: Tensor, source: Tensor, stream: Stream, there: Stream = None) -> None:
        """Copies in ``stream`` of this device; ``there`` is a stream of the other device, where there is one."""
        target.copy_(source)

    def graph(self, pool: Any) -> Graph:
        """A new, empty graph; those of one pool share memory and must not run at the same time."""
        return Graph()

    def pool(self) -> Any:
        """A new pool of memory for graphs."""
        return None


class CudaDevice(Device):
    """A CUDA device, in terms of torch.cuda; ``cuda`` is the current one."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        # By number, so that devices compare.
        super().__init__(
            device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
        )

    def stream(self, name: str) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def record(self, event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
        event.record(stream)

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def keep(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        if tensor.is_cuda:
            tensor.record_stream(stream)

    def pinned(self, like: Tensor) -> Tensor:
        # empty_strided gives no pinned memory of its own accord when strides are not the plain ones.
        flat = torch.empty(like.numel(), dtype=like.dtype, pin_memory=True)
        return flat.as_strided(like.shape, like.stride())

    def reaches(self, other: Device) -> bool:
        if not isinstance(other, CudaDevice):
            return False
        return self.device == other.device or torch.cuda.can_device_access_peer(self.device, other.device)

    def copy(
        self,
        target: Tensor,
        source: Tensor,
        stream: torch.cuda.Stream,
        there: torch.cuda.Stream | None = None,
    ) -> None:
        with ExitStack() as streams:
            # torch puts a copy between devices into the current stream of the source, and has it and the current
            # stream of the target wait for each other: without a stream of ours there that would be the user's.
            if there is not None:
                streams.enter_context(torch.cuda.stream(there))
            streams.enter_context(torch.cuda.stream(stream))
            target.copy_(source, non_blocking=True)

    def graph(self, pool: Any) -> CudaGraph:
        return CudaGraph(self.device, pool)

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()


class CudaGraph(Graph):
    """A CUDA graph in a memory pool that it shares."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], Any], stream: torch.cuda.Stream) -> Any:
        # Threads of others, such as those of a data loader, may allocate meanwhile.
        recorded = torch.cuda.graph(
            self._graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        )
        try:
            # When the end of a recording fails, torch does not put back the stream.
            with torch.cuda.device(self._device), torch.cuda.stream(stream), recorded:
                return work()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Ends a recording that failed for the allocator, which torch leaves waiting for the end: until it comes, no
        memory that another stream has used is taken back."""
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)

    def replay(self) -> None:
        self._graph.replay()


def device(place: torch.device) -> Device:
    """What drives ``place``."""
    return CudaDevice(place) if place.type == "cuda" else Device(place)
