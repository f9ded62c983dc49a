"""Plain back-propagation, the baseline: the whole network is one group."""

from __future__ import annotations

from lct_fast.methods.method import Method


class Backprop(Method):
    """End-to-end back-propagation. The engine joins all groups into one, which learns from its output."""

    name = "backprop"
    uses_critics = False
    joins_groups = True
