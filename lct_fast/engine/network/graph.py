"""What the nodes of a traced model refer to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn


def used_by(model: nn.Module, nodes: Iterable[fx.Node]) -> dict[str, nn.Module | Tensor]:
    """The modules that nodes call and the tensors that they read, by name."""
    found: dict[str, nn.Module | Tensor] = {}
    for node in nodes:
        if node.op == "call_module":
            found[str(node.target)] = model.get_submodule(str(node.target))
        elif node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            found[str(node.target)] = getattr(model.get_submodule(owner), name)
    return found
