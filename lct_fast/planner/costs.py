"""What a step costs: seconds and bytes of every group for one microbatch, and the links between them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


class PlanError(ValueError):
    """Costs or options that make no plan, in one line."""


@dataclass(frozen=True, slots=True)
class GroupCost:
    """One group, one microbatch.

    Attributes:
        forward_s: seconds of its forward pass.
        backward_s: seconds of its backward pass, input and weight gradients together.
        critic_s: seconds of its critic, forward and backward (0 for the last group).
        encode_s, decode_s: seconds of coding its output, and of decoding its input.
        activation_bytes: of its output as it is, uncoded.
        parameter_bytes: of its weights.
        input_gradient_s: the part of backward_s that a group which learns on its own does not need.
        update_s: seconds of its optimiser's step, once a step.
    """

    forward_s: float
    backward_s: float
    critic_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    activation_bytes: float = 0.0
    parameter_bytes: float = 0.0
    input_gradient_s: float = 0.0
    update_s: float = 0.0

    @property
    def work_s(self) -> float:
        """Seconds of back-propagation through this group."""
        return self.forward_s + self.backward_s

    @property
    def local_s(self) -> float:
        """Seconds of a step on this group's own loss, without coding."""
        return self.work_s - self.input_gradient_s + self.critic_s


@dataclass(frozen=True, slots=True)
class Link:
    """Between neighbouring workers, each direction.

    Attributes:
        bandwidth: bytes per second.
        latency: seconds until the first byte comes.
        worker_s: seconds that a worker itself spends on each message it sends or receives.
        worker_s_per_byte: the same for each byte. Where a CPU both computes and copies to sockets, neither is 0.
    """

    bandwidth: float
    latency: float = 0.0
    worker_s: float = 0.0
    worker_s_per_byte: float = 0.0

    def seconds(self, nbytes: float) -> float:
        """How long ``nbytes`` keep the link busy."""
        return nbytes / self.bandwidth

    def worker_seconds(self, nbytes: float) -> float:
        """How long a message of ``nbytes`` keeps the worker at either end from computing."""
        return self.worker_s + nbytes * self.worker_s_per_byte


def read_costs(path: Path) -> list[GroupCost]:
    """The groups of a file ``{"groups": [{"forward_s": ..., "backward_s": ..., ...}, ...]}``.

    Raises:
        PlanError: no such file, not JSON, an unknown or missing key, or a value that is no number >= 0; one line.
    """
    try:
        loaded = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: expected to read it, got {error}") from None
    except json.JSONDecodeError as error:
        raise PlanError(f"{path} is not JSON: {error}") from None
    return parse_costs(loaded, str(path))


def parse_costs(loaded: Any, source: str) -> list[GroupCost]:
    """As ``read_costs``, from what was in the file."""
    if not isinstance(loaded, dict) or not isinstance(loaded.get("groups"), list) or not loaded["groups"]:
        raise PlanError(f'{source}: expected {{"groups": [{{...}}, ...]}} with at least one group')
    if len(loaded) > 1:
        raise PlanError(
            f"{source}: unknown key {next(k for k in loaded if k != 'groups')!r}; expected groups"
        )
    return [_group(entry, f"{source}, group {k}") for k, entry in enumerate(loaded["groups"], 1)]


def _group(entry: Any, where: str) -> GroupCost:
    if not isinstance(entry, dict):
        raise PlanError(f"{where}: expected a mapping of costs, got {type(entry).__name__}")
    known = [f.name for f in fields(GroupCost)]
    for key, value in entry.items():
        if key not in known:
            raise PlanError(f"{where}: unknown key {key!r}; expected {', '.join(known)}")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf:
            raise PlanError(f"{where}: {key} must be a number >= 0, got {value!r}")
    for key in ("forward_s", "backward_s"):
        if key not in entry:
            raise PlanError(f"{where}: {key} is missing")
    if not entry["forward_s"] + entry["backward_s"]:
        raise PlanError(
            f"{where}: forward_s and backward_s are both 0; a group that costs nothing is no group"
        )
    if entry.get("input_gradient_s", 0.0) > entry["backward_s"]:
        raise PlanError(f"{where}: input_gradient_s is a part of backward_s and cannot be more")
    return GroupCost(**entry)


def merge(costs: Sequence[GroupCost], workers: int) -> tuple[list[GroupCost], list[int]]:
    """Neighbouring groups put together, one part a worker, so that the longest part is as short as can be.

    A part's critic, encoding and output are those of its last group, its decoding that of its first.

    Returns:
        The parts, and the number (from 1) of the group that each begins with.

    Raises:
        PlanError: fewer groups than workers.
    """
    if workers > len(costs):
        raise PlanError(
            f"{workers} workers need {workers} groups or more to share, got {len(costs)}: use fewer workers"
        )
    starts = _balanced([c.work_s for c in costs], workers)
    parts = [list(costs[a:b]) for a, b in zip(starts, [*starts[1:], len(costs)], strict=True)]
    merged = [
        GroupCost(
            sum(c.forward_s for c in part),
            sum(c.backward_s for c in part),
            part[-1].critic_s,
            part[-1].encode_s,
            part[0].decode_s,
            part[-1].activation_bytes,
            sum(c.parameter_bytes for c in part),
            part[0].input_gradient_s,
            sum(c.update_s for c in part),
        )
        for part in parts
    ]
    return merged, [a + 1 for a in starts]


def _balanced(work: list[float], parts: int) -> list[int]:
    """Where each of ``parts`` runs begins: the longest run is the shortest possible (bisection on its length)."""

    def cut(limit: float) -> list[int] | None:
        starts, total = [0], 0.0
        for i, seconds in enumerate(work):
            # Every part needs an element: the last ones get one each.
            if (
                i
                and (total + seconds > limit or len(work) - i <= parts - len(starts))
                and len(starts) < parts
            ):
                starts.append(i)
                total = 0.0
            total += seconds
            if total > limit:
                return None
        return starts if len(starts) == parts else None

    low, high = max(work), sum(work)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle) else (middle, high)
    found = cut(high)
    assert found is not None, "one run holds everything"
    return found
