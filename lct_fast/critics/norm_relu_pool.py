"""The end of a convolutional group and the pooling its critic begins with, in shared passes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as any_module

from lct_fast import ops
from lct_fast.critics.pooling import pool_to


class NormReluPool(nn.Module):
    """`y = relu(norm(x))` and `pool_to(y, side)`, through `lct_fast.ops.bn_relu_pool`.

    The gradient that the pooled map brings back is never spread over the map. Where `side` does not divide a map
    into squares, and in evaluation mode, the same is done step by step.

    Args:
        norm: its parameters and running statistics are used and updated as `norm(x)` would.
        side: of the pooled map.
        producer: a convolution whose output goes here and nowhere else, so that its gradient may be written over it;
            None if x may be somebody else's.

    Shapes: [N, C, H, W] -> y [N, C, H, W], pooled [N, C, min(side, H), min(side, W)].
    """

    def __init__(self, norm: nn.BatchNorm2d, side: int, producer: nn.Conv2d | None = None) -> None:
        super().__init__()
        self.norm, self.side = norm, side
        # In a tuple: it is no part of this module.
        self._producer = (producer,)

    @staticmethod
    def takes(norm: nn.Module) -> bool:
        """Whether `norm` is a batch norm that the op can stand for."""
        return type(norm) is nn.BatchNorm2d and norm.affine and norm.momentum is not None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm, (height, width) = self.norm, x.shape[-2:]
        pool = min(self.side, height)
        if not norm.training or pool != min(self.side, width) or height % pool or width % pool:
            y = F.relu(norm(x))
            return y, pool_to(y, self.side)
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        assert norm.momentum is not None
        (producer,) = self._producer
        out = ops.bn_relu_pool(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            True,
            norm.momentum,
            norm.eps,
            pool,
            reuse_input=producer is not None and not observed(producer),
        )
        return out.y, out.pooled


def observed(module: nn.Module) -> bool:
    """Whether a hook, or a forward of somebody's own, sees what goes through the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any_module._global_forward_hooks
        or any_module._global_forward_pre_hooks
        or any_module._global_backward_hooks
        or any_module._global_backward_pre_hooks
        or "forward" in vars(module)
    )
