"""The critic of sequence models: one linear layer to the vocabulary, at every token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lct_fast._init import he_init
from lct_fast.critics.base import Critic


class TokenLinearCritic(Critic):
    """Linear to the vocabulary at every token: h [N, T, D] is read as [N * T, D] rows, each with a loss of its own.

    The recurrent form of local critic training (arXiv 2102.01963), whose paper reports one without saying which critic.

    Args:
        shape: (T, D), the group's output without the batch; T only as in the example input.
        num_classes: size of the vocabulary.
        norm: "layer" for a layer norm without parameters in front, for groups that end in no bounded activation,
            as a transformer's blocks; or "none".

    Raises:
        ValueError: another norm.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, *, norm: str = "none") -> None:
        super().__init__()
        if norm not in ("none", "layer"):
            raise ValueError(f"critic 'token_linear': norm must be 'none' or 'layer', got {norm!r}")
        self.norm = norm
        self.head = nn.Linear(shape[1], num_classes)
        he_init(self, self.head)

    def features(self, h: Tensor) -> Tensor:
        u = h.flatten(0, -2)
        return F.layer_norm(u, u.shape[-1:]) if self.norm == "layer" else u.contiguous()

    def forward(self, h: Tensor) -> Tensor:
        """Logits [N, T, vocabulary]."""
        logits: Tensor = self.head(self.features(h))
        return logits.unflatten(0, h.shape[:-1])
