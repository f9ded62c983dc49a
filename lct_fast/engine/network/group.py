"""A group: a run of layers and the head it learns from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from lct_fast.critics import Critic
from lct_fast.engine.network.fused import FusedLayers, fuse
from lct_fast.engine.network.graph import used_by


class OutputHead(Critic):
    """The end of the network seen as a critic: the model's own last linear layer, or nothing if it ends otherwise."""

    def __init__(self, head: nn.Linear | None) -> None:
        super().__init__()
        self.head = head  # type: ignore[assignment]

    def features(self, h: Tensor) -> Tensor:
        return h if self.head is None else h.flatten(0, -2)

    def forward(self, h: Tensor) -> Tensor:
        return h if self.head is None else self.head(h)


class NoCritic(Critic):
    """Stands where a method has no critic: the group has no exit."""


class Group(nn.Module):
    """Layers h_{k-1} -> h_k and the head on h_k.

    Attributes:
        layers: the user's modules of this group, under their own names.
        critic: the head on the cut; for the last group an ``OutputHead`` around the model's classifier.
        last: whether this group holds the network's output.
        units: qualified names of the units inside, in order.
        shape: h_k without the batch, at ``split``'s example input.
    """

    def __init__(
        self,
        layers: nn.Module,
        critic: Critic,
        *,
        last: bool,
        units: list[str],
        shape: tuple[int, ...],
        cut: Cut,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.critic = critic
        self.last = last
        self.units = units
        self.shape = shape
        # In a tuple, so that the user's whole model doesn't become a submodule of each group.
        self._cut = (cut,)
        self._fused: tuple[FusedLayers | None] | None = None

    @property
    def cut(self) -> Cut:
        return self._cut[0]

    @property
    def has_exit(self) -> bool:
        """Whether groups 1..k and this one's head are a network of their own."""
        return not isinstance(self.critic, NoCritic)

    def without_critic(self) -> Group:
        """The same group, parameters shared, for a method that has no critics."""
        if self.last:
            return self
        return Group(self.layers, NoCritic(), last=False, units=self.units, shape=self.shape, cut=self.cut)

    @property
    def fused(self) -> FusedLayers | None:
        """The layers, giving h_k and what its critic begins with in shared passes; None where that cannot be."""
        if self._fused is None:
            self._fused = (fuse(self.layers, self.critic),)
        (fused,) = self._fused
        return fused if fused is not None and fused.applies else None


class Cut:
    """A traced model, the nodes that start groups 2..K, and the example input it was cut with.

    ``target_dims``: dimensions of integer targets, those of the output without the classes: 2 for tokens [N, T].
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        starts: list[fx.Node],
        num_classes: int,
        example: Tensor,
        target_dims: int = 1,
    ) -> None:
        self.model = model
        self.target_dims = target_dims
        self.example = example
        self.graph = graph
        self.starts = starts
        self.num_classes = num_classes

    def groups(self) -> list[list[fx.Node]]:
        """Nodes of each group, without input and output."""
        groups: list[list[fx.Node]] = [[]]
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node in self.starts:
                groups.append([])
            groups[-1].append(node)
        return groups


def build_module(model: nn.Module, nodes: Iterable[fx.Node], critic: Critic | None = None) -> fx.GraphModule:
    """The nodes as a module of one input and one output; its parameters are the model's own, same names.

    With ``critic`` the output goes through it, as submodule ``critic``.
    """
    nodes = list(nodes)
    inside = set(nodes)
    graph = fx.Graph()
    x = graph.placeholder("x")
    copies: dict[fx.Node, fx.Node] = {}

    def copy_of(node: fx.Node) -> fx.Node:
        return copies[node] if node in inside else x

    for node in nodes:
        copies[node] = graph.node_copy(node, copy_of)
    out = copies[nodes[-1]] if nodes else x
    root = used_by(model, nodes)
    if critic is not None:
        if "critic" in root:
            raise ValueError(
                "the model has a unit named 'critic': rename it, the name is used for the exit's head"
            )
        root["critic"] = critic
        out = graph.call_module("critic", (out,))
    graph.output(out)
    module = fx.GraphModule(root, graph, type(model).__name__)
    module.train(model.training)
    return module


def exit_module(groups: list[Group], k: int) -> nn.Module:
    """Groups 1..k and head k (1-based) as one plain module; parameters are shared, not copied.

    The last exit is the user's own model; any other has the user's parameter names plus ``critic.*``.
    """
    if not isinstance(k, int) or not 1 <= k <= len(groups):
        raise ValueError(f"exit: expected 1..{len(groups)}, got {k}")
    if not groups[k - 1].has_exit:
        raise ValueError(f"exit {k}: the method has no critics, so the only exit is the last, {len(groups)}")
    cut = groups[0].cut
    if k == len(groups):
        return cut.model
    nodes = [n for part in cut.groups()[:k] for n in part]
    return build_module(cut.model, nodes, groups[k - 1].critic)


def join(groups: list[Group]) -> Group:
    """All groups as one, without critics: the plain network."""
    whole = groups[0].cut
    cut = Cut(whole.model, whole.graph, [], whole.num_classes, whole.example, whole.target_dims)
    return make_groups(cut, [], [])[0]


def units_of(nodes: Iterable[fx.Node]) -> list[str]:
    """Names of the modules among a group's nodes, which tell it from the others."""
    return [str(n.target) for n in nodes if n.op == "call_module"]


def make_groups(cut: Cut, critics: list[Critic], shapes: list[tuple[int, ...]]) -> list[Group]:
    """Groups of a cut model; one critic and one shape for each group but the last."""
    parts = cut.groups()
    groups = []
    for k, nodes in enumerate(parts):
        last = k == len(parts) - 1
        units = units_of(nodes)
        if last:
            classifier, nodes = _classifier(cut.model, nodes)
            critic: Critic = OutputHead(classifier)
        else:
            critic = critics[k]
        shape = (cut.num_classes,) if last else shapes[k]
        layers = build_module(cut.model, nodes)
        groups.append(Group(layers, critic, last=last, units=units, shape=shape, cut=cut))
    return groups


def _classifier(model: nn.Module, nodes: list[fx.Node]) -> tuple[nn.Linear | None, list[fx.Node]]:
    """The model's last linear layer, if the output is exactly that, and the nodes before it."""
    if nodes and nodes[-1].op == "call_module":
        module = model.get_submodule(str(nodes[-1].target))
        if type(module) is nn.Linear:
            return module, nodes[:-1]
    return None, nodes


def parameter_count(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
