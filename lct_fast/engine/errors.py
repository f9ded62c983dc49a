"""What can go wrong in a run, each with a name of its own."""

from __future__ import annotations

import re


class NonFiniteError(ValueError):
    """A loss or an input is NaN or infinite; raised before the group's update."""


class OutOfMemoryError(RuntimeError):
    """A group did not fit the device's memory."""


class PacketError(ValueError):
    """A packet that is damaged, of another version, or not the one expected."""


class PeerError(RuntimeError):
    """The process of a neighbouring group, or of a replica, has gone."""


class ReplicaError(RuntimeError):
    """Replicas that must be the same have drifted apart."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another run."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without torch's source position."""
    lines = str(error).splitlines() or [type(error).__name__]
    return re.sub(r"^\[enforce fail at [^\]]*\]\s*\.?\s*", "", lines[0])
