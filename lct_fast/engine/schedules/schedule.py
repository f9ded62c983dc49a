"""What runs a trainer's groups: its schedule, checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from lct_fast.engine.arguments import check_integer
from lct_fast.engine.hybrid import Hybrid
from lct_fast.engine.schedules.stage import DEPTH
from lct_fast.engine.storage.replay import ReplayBuffer
from lct_fast.methods import Greedy, Method

SCHEDULES = ("lockstep", "pipelined", "async")
# With this delay feedback comes before it is due, however far a link lets a group run ahead.
PIPELINED_DELAY = DEPTH + 1


@dataclass(frozen=True, slots=True)
class Async:
    """Every group at its own pace, out of a replay buffer at each cut (arXiv 2106.06401); for ``Greedy()``.

    Over processes where torch.distributed is initialised with more than one, else a seeded simulation in this one.

    Args:
        steps: batches that each group trains on. ``Trainer.step`` takes more than that until ``finished``.
        buffer: slots of the replay buffer at each cut.
        reuse_limit: how often a group takes a slot at most; with all at it the group idles. None: no limit.
        slow_group, slow_down: simulated only: that group (1-based) gets a turn ``slow_down`` times as seldom as
            another one.

    Raises:
        ValueError: an argument out of range, in one line.
    """

    steps: int
    buffer: int = 1
    reuse_limit: int | None = None
    slow_group: int | None = None
    slow_down: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected a number of batches >= 1 for each group, got {self.steps}")
        ReplayBuffer(self.buffer, self.reuse_limit)
        if self.slow_group is not None and self.slow_group < 1:
            raise ValueError(f"slow_group: expected the number of a group or None, got {self.slow_group}")
        if not 1 <= self.slow_down < float("inf"):
            raise ValueError(f"slow_down: expected a number >= 1, got {self.slow_down}")
        if self.slow_down > 1 and self.slow_group is None:
            raise ValueError(f"slow_down {self.slow_down}: slow_group says which group is slow, got None")


@dataclass(frozen=True, slots=True)
class Plan:
    """A schedule as a trainer runs it.

    Attributes:
        name: one of ``SCHEDULES``; of a hybrid, that of its other batches.
        feedback_delay: as in ``Trainer``, its default filled in.
        hybrid, pace: None where the schedule is no ``Hybrid`` with a share, no ``Async``.
        over_processes: one process a group, not all in this one.
    """

    name: str
    feedback_delay: int
    hybrid: Hybrid | None
    pace: Async | None
    over_processes: bool


def plan(
    schedule: str | Hybrid | Async, method: Method, groups: int, feedback_delay: int | None, replicas: int
) -> Plan:
    """What ``Trainer``'s arguments ask for.

    Raises:
        ValueError: a schedule that is unknown, or that method, delay or replicas do not fit, in one line.
    """
    hybrid = schedule if isinstance(schedule, Hybrid) else None
    pace = schedule if isinstance(schedule, Async) else None
    name = hybrid.schedule if hybrid else "async" if pace else schedule
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}; got {name!r}")
    _check_method(str(name), method, hybrid, pace, groups)
    pipelined = name == "pipelined"
    delay = feedback_delay if feedback_delay is not None else PIPELINED_DELAY if pipelined else 0
    check_integer("feedback_delay", delay, int(pipelined))
    over_processes = name != "lockstep" and _several_processes()
    if pace is not None and over_processes and pace.slow_down > 1:
        raise ValueError("slow_down simulates a slow group in one process: over processes leave it out")
    check_integer("replicas", replicas, 1)
    # A share of 0 is no hybrid.
    hybrid = hybrid if hybrid and hybrid.serial else None
    if replicas > 1 and method.sample_state:
        raise ValueError(
            f"replicas={replicas}: {method.name} keeps a state for each sample, which replicas do not share; use 1"
        )
    if replicas > 1 and not (pipelined and over_processes and hybrid is None):
        raise ValueError(
            f"replicas={replicas} takes the pipelined schedule, without serial steps, over {replicas} processes a "
            f"group: start with torchrun, initialise torch.distributed and give schedule='pipelined'"
        )
    return Plan(str(name), delay, hybrid, pace, over_processes)


def check_carried(planned: Plan) -> None:
    """Refuses a schedule that cannot train layers that carry state from batch to batch.

    Raises:
        ValueError: in one line.
    """
    if planned.pace is not None:
        raise ValueError(
            "recurrent layers go on from the batch before, and schedule async takes batches in any order: use lockstep "
            "or pipelined"
        )
    if planned.hybrid is not None and planned.hybrid.microbatches > 1:
        raise ValueError(
            f"recurrent layers go on from the batch before, whole: expected microbatches=1 in serial steps, got "
            f"{planned.hybrid.microbatches}"
        )


def _check_method(name: str, method: Method, hybrid: Hybrid | None, pace: Async | None, groups: int) -> None:
    if method.asks_behind and name != "lockstep":
        raise ValueError(
            f"{method.name} has no {name} schedule: every group asks those behind it for their loss of the same batch; "
            f"use lockstep"
        )
    if hybrid is not None and method.joins_groups:
        raise ValueError(
            f"{method.name} has no Hybrid: all of its batches are serial; use a method whose groups learn on their own"
        )
    if name == "pipelined" and method.joins_groups:
        raise ValueError(
            f"{method.name} has no pipelined schedule here: use torch.distributed.pipelining, or a method whose "
            f"groups learn on their own"
        )
    if name != "lockstep" and method.feedback_from_last:
        raise ValueError(
            f"critics that learn from the last group's loss take schedule lockstep, got {name}: its feedback goes back "
            f"over one cut; use target 'next'"
        )
    if name != "async":
        return
    if method.name != Greedy.name:
        raise ValueError(f"{method.name} has no async schedule: use greedy")
    if pace is None:
        raise ValueError(
            "schedule async: say how many batches each group trains on, as in schedule=lct.Async(steps=1000)"
        )
    if pace.slow_group is not None and pace.slow_group > groups:
        raise ValueError(f"slow_group: expected 1..{groups} or None, got {pace.slow_group}")


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
