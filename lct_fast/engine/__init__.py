"""The engine: groups, what crosses between them, and the schedules that train them. It knows no formula."""

from lct_fast.engine.errors import (
    CheckpointError,
    NonFiniteError,
    OutOfMemoryError,
    PacketError,
    PeerError,
    ReplicaError,
)
from lct_fast.engine.exits import Evaluation
from lct_fast.engine.group import Group
from lct_fast.engine.hybrid import Hybrid
from lct_fast.engine.schedules import Async
from lct_fast.engine.split import split
from lct_fast.engine.stats import Mark, Stats
from lct_fast.engine.trainer import Trainer

__all__ = [
    "Async",
    "CheckpointError",
    "Evaluation",
    "Group",
    "Hybrid",
    "Mark",
    "NonFiniteError",
    "OutOfMemoryError",
    "PacketError",
    "PeerError",
    "ReplicaError",
    "Stats",
    "Trainer",
    "split",
]
