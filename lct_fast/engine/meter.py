"""Where time and bytes go, group by group."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

# A critic's own forward, backward and update, everything plain back-propagation would not do.
CRITIC = ("critic", "critic update")
# Idle, each named for what was missing: the group before's output, room in the link, the group behind's loss.
WAITS = ("wait for input", "wait for room", "wait for feedback")
# The first tick warms up and, in a pipeline, waits for the groups before to begin.
WARM_UP = 1


class Event(NamedTuple):
    """A span for the trace; ``row`` is "compute" or the name of a link's end; seconds of the process's clock."""

    row: str
    name: str
    start: float
    end: float
    batch: int


class Tick(NamedTuple):
    """One batch of one group: seconds from its start to its end, and how they were spent.

    ``exposed`` is the part of the wait for input during which the input was already on its way.
    """

    batch: int
    seconds: float
    busy: float
    critic: float
    input: float
    room: float
    feedback: float
    exposed: float


class _Span:
    """A context manager that charges its time to a name; cheaper than one made of a generator."""

    __slots__ = ("meter", "name", "start")

    def __init__(self, meter: GroupMeter, name: str) -> None:
        self.meter, self.name = meter, name

    def __enter__(self) -> _Span:
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.meter.add(self.name, self.start, time.perf_counter())


@dataclass
class GroupMeter:
    """Times named spans of one group and counts its bytes, tick by tick.

    Host clock: on a CUDA device spans are the time to launch, so shares of time are only given for CPU runs.

    Args:
        index: number of the group, from 0.
        last: whether its head is the network's own.
        trace_ticks: how many ticks after the warm-up the trace keeps.

    Attributes:
        seconds: per name of span, over all ticks but the warm-up.
        ticks: the latest 1,000.
        samples: trained on.
        updates, reused, age: of an asynchronous run: batches trained on; those of them that had been taken from the
            buffer before; batches written to it since theirs, summed over all.
        readings: of the group's gradients, see ``Diagnosis``.
        codebook: of the encoder's codebook, see ``Codec.codebook_use``; one reading an evaluation, with its ``batch``.
        wire_bytes, raw_bytes: sent forward, and what fp32 would have been; ``codebook_bytes`` of the former were
            codebooks. feedback_bytes: from behind, applied.
        serial_steps, serial_seconds: serial steps (``Hybrid``) and what they took; they are no ticks.
        serial_bytes: of h_k forward and its gradient back, in serial steps; ``wire_bytes`` is without them.
    """

    index: int
    last: bool = False
    trace_ticks: int = 20
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    exposed: float = 0.0
    ticks: deque[Tick] = field(default_factory=lambda: deque(maxlen=1000))
    count: int = 0
    total: float = 0.0
    samples: int = 0
    wire_bytes: int = 0
    raw_bytes: int = 0
    codebook_bytes: int = 0
    feedback_bytes: int = 0
    serial_steps: int = 0
    serial_seconds: float = 0.0
    serial_bytes: int = 0
    updates: int = 0
    reused: int = 0
    age: int = 0
    readings: list[list[Any]] = field(default_factory=list)
    codebook: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._here: dict[str, float] = defaultdict(float)
        self._exposed = 0.0
        self._first_traced = WARM_UP
        self._start = 0.0
        self._batch = 0

    def span(self, name: str) -> _Span:
        """Charges the time inside to ``name``."""
        if self.last and name in CRITIC:
            name = "head"
        return _Span(self, name)

    def begin(self, batch: int) -> None:
        """A tick begins: the group turns to ``batch``."""
        self._here.clear()
        self._exposed = 0.0
        self._batch = batch
        self._start = time.perf_counter()

    def end(self) -> None:
        """The tick is over."""
        now = time.perf_counter()
        here = self._here
        missing, room, feedback = (here.get(name, 0.0) for name in WAITS)
        critic = sum(here.get(name, 0.0) for name in CRITIC)
        busy = sum(here.values()) - missing - room - feedback
        seconds = now - self._start
        self.count += 1
        if self.count <= WARM_UP:
            return
        self.ticks.append(Tick(self._batch, seconds, busy, critic, missing, room, feedback, self._exposed))
        self.total += seconds
        self.exposed += self._exposed
        for name, value in here.items():
            self.seconds[name] += value

    def add(self, name: str, start: float, end: float) -> None:
        """Charges the time from ``start`` to ``end`` to ``name``."""
        self._here[name] += end - start
        self.trace(Event("compute", name, start, end, self._batch))

    def add_exposed(self, seconds: float) -> None:
        """That much of the wait for input was transfer."""
        self._exposed += seconds

    def took(self, age: int, uses: int) -> None:
        """A batch to train on came out of a replay buffer, with ``age`` newer ones there and ``uses`` uses before."""
        self.age += age
        self.reused += uses > 0

    def add_counts(self, other: GroupMeter) -> None:
        """Takes in the samples and bytes of the same group in another replica."""
        self.samples += other.samples
        self.wire_bytes += other.wire_bytes
        self.raw_bytes += other.raw_bytes
        self.codebook_bytes += other.codebook_bytes
        self.feedback_bytes += other.feedback_bytes

    def trace_from_here(self, ticks: int) -> None:
        """Forgets the trace so far and keeps that of the next ``ticks`` ticks."""
        self.events.clear()
        self._first_traced, self.trace_ticks = self.count, ticks

    def trace(self, event: Event) -> None:
        """Keeps an event, if it is early enough. Links call this from threads of their own."""
        if 0 <= self.count - self._first_traced < self.trace_ticks:
            self.events.append(event)

    @property
    def busy(self) -> float:
        """Seconds of all spans but waits."""
        return sum(s for name, s in self.seconds.items() if name not in WAITS)

    @property
    def waiting(self) -> float:
        """Seconds of all waits."""
        return sum(self.seconds[name] for name in WAITS if name in self.seconds)

    @property
    def critic(self) -> float:
        """Seconds in the critic, its update included."""
        return sum(self.seconds[name] for name in CRITIC if name in self.seconds)

    def timed(self) -> int:
        """Ticks that ``seconds`` covers."""
        return max(self.count - WARM_UP, 0)


class Meter:
    """A run's meter: the meters of its groups, of this process or gathered from all.

    Args:
        groups: one a group, in order.
    """

    def __init__(self, groups: Sequence[GroupMeter]) -> None:
        self.groups = list(groups)
        self.step_seconds: deque[float] = deque(maxlen=1000)

    @property
    def samples(self) -> int:
        """Samples that the first of the groups trained on."""
        return self.groups[0].samples

    @property
    def wire_bytes(self) -> int:
        """Over the cuts, forward, and in serial steps back too."""
        return sum(g.wire_bytes for g in self.groups) + self.serial_bytes

    @property
    def serial_bytes(self) -> int:
        return sum(g.serial_bytes for g in self.groups)

    @property
    def serial_steps(self) -> int:
        return self.groups[-1].serial_steps

    @property
    def serial_seconds(self) -> float:
        """Of the last group; in one process the groups share them."""
        return self.groups[-1].serial_seconds

    @property
    def raw_bytes(self) -> int:
        return sum(g.raw_bytes for g in self.groups)

    @property
    def feedback_bytes(self) -> int:
        return sum(g.feedback_bytes for g in self.groups)

    def per_sample(self, count: int) -> float:
        """``count`` divided by the samples seen."""
        return count / self.samples if self.samples else 0.0

    def replay(self) -> dict[str, list[Any]]:
        """Of an asynchronous run, per group: batches trained on, their mean age and how many were used before.

        The age of a batch is the number of newer ones in the buffer when it is taken; group 1 has none.
        """
        return {
            "updates": [g.updates for g in self.groups],
            "mean_age": [g.age / g.updates if g.updates else 0.0 for g in self.groups],
            "reused": [g.reused for g in self.groups],
        }

    def step_seconds_median(self) -> float | None:
        """Median seconds from one finished batch to the next, over the latest 1,000."""
        return median(self.step_seconds) if self.step_seconds else None

    def critic_tax(self) -> float | None:
        """Share of busy time spent in critics; None before the second tick."""
        busy = sum(g.busy for g in self.groups)
        return sum(g.critic for g in self.groups) / busy if busy else None

    def imbalance(self) -> float | None:
        """Busy seconds a tick of the slowest group over the mean of all, less 1."""
        if not all(g.timed() for g in self.groups):
            return None
        busy = [g.busy / g.timed() for g in self.groups]
        return max(busy) * len(busy) / sum(busy) - 1

    def bubble_fraction(self) -> float | None:
        """Share of the groups' time spent waiting, transfers that nothing hides left out. For pipelined runs."""
        total = sum(g.total for g in self.groups)
        return sum(g.waiting - g.exposed for g in self.groups) / total if total else None

    def exposed_transfer_fraction(self) -> float | None:
        """Share of the groups' time spent waiting for an input that was on its way. For pipelined runs."""
        total = sum(g.total for g in self.groups)
        return sum(g.exposed for g in self.groups) / total if total else None

    def efficiency(self) -> float | None:
        """Share of the groups' time spent on what plain back-propagation would do too.

        An estimate of eta = T_1 / (K T_K) from inside the run: busy seconds, critics left out, over all seconds.
        """
        total = sum(g.total for g in self.groups)
        return sum(g.busy - g.critic for g in self.groups) / total if total else None
