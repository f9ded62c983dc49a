"""Who has stopped answering, and whose fault the end of a run is: judged from what ranks tell, by one's own clock."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class Phase(StrEnum):
    """Where a rank's training loop is: before the end of its first batch, in the stream, or behind its end."""

    STARTING = "starting"
    RUNNING = "running"
    ENDING = "ending"


class Beat(NamedTuple):
    """What a rank tells of itself. Counters only say "something moved": clocks of two machines are never compared.

    ``alive`` counts passes of the rank's watchdog, ``turns`` those of its training loop, waiting included, and
    ``work`` those that did something. ``batch`` is the last one done, -1 before; ``waits`` is what it waits for, empty
    while it works.
    """

    alive: int = 0
    turns: int = 0
    work: int = 0
    phase: str = Phase.STARTING
    batch: int = -1
    waits: str = ""


class Report(NamedTuple):
    """A rank's reason to end. ``accuses`` is the rank it lost, or None if the fault is its own."""

    rank: int
    batch: int
    why: str
    accuses: int | None = None


class _Since:
    """When a value was last seen to change."""

    def __init__(self, value: object, now: float) -> None:
        self.value, self.at = value, now

    def see(self, value: object, now: float) -> float:
        """Seconds since the last change."""
        if value != self.value:
            self.value, self.at = value, now
        return now - self.at


class Watch:
    """Looks at all ranks' beats again and again.

    Args:
        rank: one's own.
        size: number of ranks.
        start_timeout, step_timeout: seconds that a training loop may stand still before and after its first batch.
        now: seconds of one's own clock.
        pause: time between two looks that counts in full; of a longer one, in which this process did not run
            (stopped, or the machine suspended), no more is counted.
    """

    def __init__(
        self, rank: int, size: int, start_timeout: float, step_timeout: float, now: float, pause: float
    ) -> None:
        self.rank = rank
        self.limits = {Phase.STARTING.value: start_timeout, Phase.RUNNING.value: step_timeout}
        self._step_timeout = step_timeout
        self.beats = [Beat()] * size
        self._pause, self._looked, self._clock = pause, now, 0.0
        self._alive = [_Since(0, 0.0) for _ in range(size)]
        self._turns = [_Since((0, Phase.STARTING), 0.0) for _ in range(size)]
        self._work = _Since(None, 0.0)

    def look(self, beats: Sequence[Beat], now: float) -> Report | None:
        """Takes the newest beats; a report if a loop stands still, or if all wait for each other."""
        self._clock += min(now - self._looked, self._pause)
        self._looked = now
        self.beats = list(beats)
        silent = [s.see(b.alive, self._clock) for s, b in zip(self._alive, beats, strict=True)]
        still = [s.see((b.turns, b.phase), self._clock) for s, b in zip(self._turns, beats, strict=True)]
        idle = self._work.see([b.work for b in beats], self._clock)
        over = [
            (seconds - self.limits[beat.phase], rank)
            for rank, (seconds, beat) in enumerate(zip(still, beats, strict=True))
            if beat.phase in self.limits and seconds > self.limits[beat.phase]
        ]
        if over:
            rank = max(over)[1]
            return self._standing(rank, still[rank], silent[rank])
        for rank, (seconds, beat) in enumerate(zip(silent, beats, strict=True)):
            # Behind the stream's end a loop does not turn, but its process lives.
            if beat.phase == Phase.ENDING and rank != self.rank and seconds > self._step_timeout:
                return Report(self.rank, beat.batch, f"stopped answering {seconds:.0f} s ago", rank)
        # Every loop turns, or it would be named above: all that turn and do nothing wait.
        limit = max(self.limits[b.phase] for b in beats) if self._all_watched() else None
        if limit is not None and idle > limit:
            waits = ", ".join(f"rank {r} for {b.waits}" for r, b in enumerate(beats))
            own = beats[self.rank].batch
            return Report(
                self.rank, own, f"all ranks answer, but nothing has moved for {idle:.0f} s (waiting: {waits})"
            )
        return None

    def _all_watched(self) -> bool:
        return all(b.phase in self.limits for b in self.beats)

    def _standing(self, rank: int, still: float, silent: float) -> Report:
        beat, limit = self.beats[rank], self.limits[self.beats[rank].phase]
        name = "start_timeout" if beat.phase == Phase.STARTING else "step_timeout"
        if rank != self.rank and silent >= min(still, limit) / 2:
            return Report(self.rank, beat.batch, f"stopped answering {still:.0f} s ago", rank)
        why = f"has stood still in its training loop for {still:.0f} s: raise {name} if a step may take this long"
        return Report(self.rank, beat.batch, why, None if rank == self.rank else rank)


def root_cause(reports: Sequence[Report], patient: bool) -> Report | None:
    """The report that names the cause, as ``Report(rank at fault, its batch, why)``; None while it is open.

    A rank that reports a fault of its own is the cause; failing that a rank that others have lost and that says
    nothing; failing that the link between two ranks that have lost each other.

    Args:
        reports: in the order they were made.
        patient: whether a rank that others have lost may still speak.
    """
    for report in reports:
        if report.accuses is None:
            return report
    told = {r.rank for r in reports}
    for report in reports:
        assert report.accuses is not None
        if report.accuses not in told:
            return None if patient else report
    return reports[0] if reports else None
