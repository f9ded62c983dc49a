"""How much of a codebook is used."""

from __future__ import annotations

import torch
from torch import Tensor


def used(chosen: Tensor) -> float:
    """Share of codewords chosen at least once; ``chosen`` [G, K] counts how often each was."""
    return float((chosen > 0).double().mean())


def perplexity(chosen: Tensor) -> float:
    """exp of the entropy of the choices, the mean over G codebooks: K where all words are chosen alike, 1 where one is.

    Args:
        chosen: [G, K], how often each word was chosen; each codebook at least once.
    """
    n = chosen.double()
    return float(torch.special.entr(n / n.sum(1, keepdim=True)).sum(1).exp().mean())
