"""Decoupled greedy learning (DGL), synchronous form: arXiv 2106.06401 (and 1901.08164)."""

from __future__ import annotations

from lct_fast.methods.method import Method


class Greedy(Method):
    """Each group and its auxiliary head learn together from the head's own cross-entropy (arXiv 2106.06401).

    Group and head share one optimiser and one backward; h_k leaves before the update. Nothing travels back.
    """

    name = "greedy"
