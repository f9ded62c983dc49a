"""The end of a group of linear layers and the logits of its linear critic, in one pass."""

from __future__ import annotations

from torch import Tensor, nn

from lct_fast import ops


class LinearLogits(nn.Module):
    """`h = act(linear(x))` and the critic's logits of h, through `lct_fast.ops.group_linear`.

    Gradients reach the layer from both; the critic's own come from whoever has its logits' gradient.

    Args:
        linear: the group's last layer.
        activation: "none", "relu" or "gelu".
        head: the critic's linear layer, for fewer than 64 classes.

    Shapes: [N, in] -> h [N, out], logits [N, classes].
    """

    def __init__(self, linear: nn.Linear, activation: str, head: nn.Linear) -> None:
        super().__init__()
        self.linear, self.activation = linear, activation
        # In a tuple: it is no part of the group's layers.
        self._head = (head,)

    @staticmethod
    def takes(linear: nn.Module, head: nn.Linear) -> bool:
        """Whether the op can stand for these: the layer's output is what the head reads, and classes are few."""
        return (
            type(linear) is nn.Linear
            and head.in_features == linear.out_features
            and head.out_features < ops.UNFUSED_CLASSES
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (head,) = self._head
        bias = None if head.bias is None else head.bias.detach()
        out = ops.group_linear(
            x, self.linear.weight, self.linear.bias, self.activation, head.weight.detach(), bias
        )
        assert out.logits is not None
        return out.h, out.logits
