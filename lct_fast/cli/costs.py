"""What critics cost beside their groups, counted."""

from __future__ import annotations

from collections.abc import Sequence

from lct_fast.engine.network.group import Group
from lct_fast.models.macs import macs


def critic_mac_share(groups: Sequence[Group]) -> list[float] | None:
    """Each critic's multiply-accumulates over those of the layers it sits on, for one sample's forward pass.

    One number for each group but the last, whose head is the network's own. None where a layer does not run on the
    meta device, where they are counted, or where groups begin with something else than floating-point numbers.
    """
    example = groups[0].cut.example
    if not example.is_floating_point():
        return None
    shapes = [tuple(example.shape[1:]), *(group.shape for group in groups[:-1])]
    try:
        return [
            macs(group.critic, group.shape) / max(1, macs(group.layers, shape))
            for group, shape in zip(groups[:-1], shapes, strict=False)
        ]
    except (RuntimeError, NotImplementedError):
        return None
