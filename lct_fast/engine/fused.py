"""Layers that give their output and its average pool in shared passes, where they end in batch norm and ReLU."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lct_fast.critics.norm_relu_pool import NormReluPool, observed
from lct_fast.engine.graph import used_by

_TAIL = "norm_relu_pool"
_RELU = (F.relu, torch.relu, torch.relu_)


class FusedLayers(nn.Module):
    """The same layers, `forward(x) -> (h, pool_to(h, side))`; parameters and buffers are shared with them.

    Attributes:
        bypassed: modules whose own `forward` is not called.
    """

    def __init__(self, graph_module: fx.GraphModule, bypassed: list[nn.Module]) -> None:
        super().__init__()
        self.graph_module, self.bypassed = graph_module, bypassed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, pooled = self.graph_module(x)
        return h, pooled

    @property
    def altered(self) -> bool:
        """Whether a hook, or a forward of somebody's own, waits for a call that would not come."""
        return any(map(observed, self.bypassed))


def fuse(layers: nn.Module, side: int) -> FusedLayers | None:
    """`layers` with a fused end, or None where they end otherwise.

    Args:
        layers: one input and one output; what torch.fx cannot trace is left as it is.
        side: of the pooled map.
    """
    if not isinstance(layers, fx.GraphModule):
        return None
    opened = _opened(layers)
    graph = _trace(layers, opened)
    if graph is None:
        return None
    (output,) = (n for n in graph.nodes if n.op == "output")
    relu = output.args[0]
    norm = relu.args[0] if _is_relu(layers, relu) else None
    if (
        not isinstance(norm, fx.Node)
        or norm.op != "call_module"
        or not NormReluPool.takes(layers.get_submodule(str(norm.target)))
        or len(norm.users) > 1
        or len(relu.users) > 1
    ):
        return None
    bypassed = [layers.get_submodule(name) for name in (*opened, str(norm.target))]
    if relu.op == "call_module":
        bypassed.append(layers.get_submodule(str(relu.target)))
    root = used_by(layers, graph.nodes)
    root[_TAIL] = NormReluPool(bypassed[len(opened)], side, _sole_producer(layers, norm))  # type: ignore[arg-type]
    with graph.inserting_before(output):
        tail = graph.call_module(_TAIL, (norm.args[0],))
    output.args = (tail,)
    for node in (relu, norm):
        graph.erase_node(node)
    return FusedLayers(fx.GraphModule(root, graph), bypassed)


class _Tracer(fx.Tracer):
    """Opens only the modules that are named."""

    def __init__(self, opened: list[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def _trace(layers: fx.GraphModule, opened: list[str]) -> fx.Graph | None:
    """The graph in training mode; None where it depends on data or on chance."""
    training, drawn = layers.training, (random.getstate(), torch.get_rng_state())
    layers.train()
    try:
        graph = _Tracer(opened).trace(layers)
    except Exception:
        return None
    finally:
        layers.train(training)
    if random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[1]):
        return graph
    random.setstate(drawn[0])
    torch.set_rng_state(drawn[1])
    return None


def _opened(layers: fx.GraphModule) -> list[str]:
    """The module that makes the output, where it is one of the user's own: what it ends in is inside."""
    (output,) = (n for n in layers.graph.nodes if n.op == "output")
    last = output.args[0]
    if not isinstance(last, fx.Node) or last.op != "call_module":
        return []
    module = layers.get_submodule(str(last.target))
    return [] if type(module).__module__.startswith("torch.nn") else [str(last.target)]


def _sole_producer(layers: nn.Module, norm: fx.Node) -> nn.Conv2d | None:
    """The convolution whose output nothing but the norm reads."""
    before = norm.args[0]
    if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
        return None
    module = layers.get_submodule(str(before.target))
    return module if type(module) is nn.Conv2d else None


def _is_relu(layers: nn.Module, node: object) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_module":
        return type(layers.get_submodule(str(node.target))) is nn.ReLU
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _RELU
