"""The engine: groups, what crosses between them, and the schedules that train them. It knows no formula."""

from lct_fast.engine.errors import (
    CheckpointError,
    NonFiniteError,
    OutOfMemoryError,
    PacketError,
    PeerError,
    ReplicaError,
)
from lct_fast.engine.hybrid import Hybrid
from lct_fast.engine.network.exits import Evaluation
from lct_fast.engine.network.group import Group
from lct_fast.engine.network.split import split
from lct_fast.engine.schedules.schedule import Async
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
