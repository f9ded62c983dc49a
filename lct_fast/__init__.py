"""lct_fast: train deep networks on many devices without backward locking.

groups = lct.split(model, 4, example_input, critic="pooled_linear")
trainer = lct.Trainer(groups, lct.LocalCritic())
for x, y in loader:
    stats = trainer.step(x, y)
"""

from lct_fast import codecs, critics, data, models, ops
from lct_fast.engine import (
    Async,
    Evaluation,
    Group,
    Hybrid,
    Mark,
    NonFiniteError,
    OutOfMemoryError,
    PacketError,
    PeerError,
    ReplicaError,
    Stats,
    Trainer,
    split,
)
from lct_fast.methods import Backprop, Greedy, LayerParallel, LikelihoodRatio, LocalCritic, Method
from lct_fast.ops import use_backend

__version__ = "0.1.0"

__all__ = [
    "Async",
    "Backprop",
    "Evaluation",
    "Greedy",
    "Group",
    "Hybrid",
    "LayerParallel",
    "LikelihoodRatio",
    "LocalCritic",
    "Mark",
    "Method",
    "NonFiniteError",
    "OutOfMemoryError",
    "PacketError",
    "PeerError",
    "ReplicaError",
    "Stats",
    "Trainer",
    "codecs",
    "critics",
    "data",
    "models",
    "ops",
    "split",
    "use_backend",
]
