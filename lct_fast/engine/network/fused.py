"""Layers that give their output and what their critic begins with in shared passes, where they end as an op does."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lct_fast.critics import Critic
from lct_fast.critics.linear import LinearCritic
from lct_fast.critics.linear_logits import LinearLogits
from lct_fast.critics.norm_relu_pool import NormReluPool, observed
from lct_fast.engine.network.graph import used_by

_TAIL = "tail"
_RELU = (F.relu, torch.relu, torch.relu_)


class FusedLayers(nn.Module):
    """The same layers, giving more: parameters and buffers are shared with them.

    `forward(x)` gives h and its average pool, or with ``gives_logits`` the critic's logits.

    Attributes:
        bypassed: modules whose own `forward` is not called.
    """

    def __init__(self, graph_module: nn.Module, bypassed: list[nn.Module], gives_logits: bool) -> None:
        super().__init__()
        self.graph_module, self.bypassed, self.gives_logits = graph_module, bypassed, gives_logits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, read = self.graph_module(x)
        return h, read

    def compiled(self) -> FusedLayers:
        """The same through torch.compile.

        It compiles the traced layers, whose code is each group's own: of code that groups share, such as ``forward``
        here, torch keeps eight versions, and runs further groups without a word as they are.
        """
        return FusedLayers(torch.compile(self.graph_module), self.bypassed, self.gives_logits)  # type: ignore[arg-type]

    @property
    def applies(self) -> bool:
        """False where a hook, or a forward of somebody's own, waits for a call that would not come; and for logits
        under autocast, as 16-bit ones are less exact than what `critic_head` makes of h."""
        if self.gives_logits and (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return False
        return not any(map(observed, self.bypassed))


def fuse(layers: nn.Module, critic: Critic) -> FusedLayers | None:
    """`layers` with a fused end: batch norm, ReLU and the critic's pool, or linear, activation and its logits.

    None where they end otherwise, or the critic begins otherwise.

    Args:
        layers: one input and one output; what torch.fx cannot trace is left as it is.
        critic: the head on them.
    """
    if not isinstance(layers, fx.GraphModule):
        return None
    opened = _opened(layers)
    graph = _trace(layers, opened)
    if graph is None:
        return None
    (output,) = (n for n in graph.nodes if n.op == "output")
    activation, end = _end(layers, output.args[0])
    if not end:
        return None
    node = end[-1]
    module = layers.get_submodule(str(node.target))
    tail: nn.Module
    if critic.pool is not None and activation == "relu" and NormReluPool.takes(module):
        tail = NormReluPool(module, critic.pool, _sole_producer(layers, node))  # type: ignore[arg-type]
    elif isinstance(critic, LinearCritic) and LinearLogits.takes(module, critic.head):
        tail = LinearLogits(module, activation, critic.head)  # type: ignore[arg-type]
    else:
        return None
    names = (*opened, *(str(n.target) for n in end if n.op == "call_module"))
    root = used_by(layers, graph.nodes) | {_TAIL: tail}
    with graph.inserting_before(output):
        output.args = (graph.call_module(_TAIL, (node.args[0],)),)
    for each in end:
        graph.erase_node(each)
    bypassed = [layers.get_submodule(n) for n in names]
    return FusedLayers(fx.GraphModule(root, graph), bypassed, isinstance(tail, LinearLogits))


def _end(layers: nn.Module, node: object) -> tuple[str, list[fx.Node]]:
    """The activation ("none", "relu", "gelu") and the nodes from it back to a module, each read by the next alone."""
    activation, end = _activation(layers, node), []
    if activation != "none":
        assert isinstance(node, fx.Node)
        end.append(node)
        node = node.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        end.append(node)
        if type(layers.get_submodule(str(node.target))) is not nn.Identity:
            return activation, end if all(len(n.users) == 1 for n in end) else []
        node = node.args[0]
    return activation, []


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


def _activation(layers: nn.Module, node: object) -> str:
    if not isinstance(node, fx.Node):
        return "none"
    if node.op == "call_module":
        module = layers.get_submodule(str(node.target))
        gelu = type(module) is nn.GELU and module.approximate == "none"
        return "relu" if type(module) is nn.ReLU else "gelu" if gelu else "none"
    if node.op == "call_method":
        return "relu" if node.target in ("relu", "relu_") else "none"
    if node.op == "call_function" and node.target is F.gelu:
        return "gelu" if node.kwargs.get("approximate", "none") == "none" else "none"
    return "relu" if node.op == "call_function" and node.target in _RELU else "none"
