"""What a group learns from: one method, one file."""

from lct_fast.methods.backprop import Backprop
from lct_fast.methods.greedy import Greedy
from lct_fast.methods.layer_parallel import LayerParallel
from lct_fast.methods.likelihood_ratio import LikelihoodRatio
from lct_fast.methods.local_critic import LocalCritic
from lct_fast.methods.method import LocalStep, Method, SampleState, Slot
from lct_fast.methods.objective import Objective

METHODS: dict[str, type[Method]] = {m.name: m for m in (Backprop, LocalCritic, Greedy, LikelihoodRatio)}

__all__ = [
    "METHODS",
    "Backprop",
    "Greedy",
    "LayerParallel",
    "LikelihoodRatio",
    "LocalCritic",
    "LocalStep",
    "Method",
    "Objective",
    "SampleState",
    "Slot",
]
