"""Critics: the small heads a group of layers learns from.

`build("conv_fc:convs=3,filters=64", (128, 16, 16), 10)` makes one for a group whose output is 128 x 16 x 16.
"""

from __future__ import annotations

from lct_fast._spec import parse_spec
from lct_fast.critics.base import Critic
from lct_fast.critics.cnn_aux import CnnAuxCritic
from lct_fast.critics.conv_fc import ConvFcCritic
from lct_fast.critics.depthwise import DepthwiseCritic
from lct_fast.critics.linear import LinearCritic, PooledLinearCritic
from lct_fast.critics.mlp_aux import MlpAuxCritic
from lct_fast.critics.mlp_sr_aux import MlpSrAuxCritic
from lct_fast.critics.shared import SharedCritic
from lct_fast.critics.token_linear import TokenLinearCritic

_CRITICS: dict[str, type[Critic]] = {
    "cnn_aux": CnnAuxCritic,
    "conv_fc": ConvFcCritic,
    "depthwise": DepthwiseCritic,
    "linear": LinearCritic,
    "mlp_aux": MlpAuxCritic,
    "mlp_sr_aux": MlpSrAuxCritic,
    "pooled_linear": PooledLinearCritic,
    "shared": SharedCritic,
    "token_linear": TokenLinearCritic,
}


def names() -> list[str]:
    """Names `build` knows, sorted."""
    return sorted(_CRITICS)


def build(spec: str, shape: tuple[int, ...], num_classes: int) -> Critic:
    """A new critic, in training mode, weights drawn from torch's global generator.

    Args:
        spec: `"name"` or `"name:key=value,key=value"`, see `names()`; the options are the keyword arguments
            of the critic's class.
        shape: the group's output without the batch, (C, H, W) or (D,); for tokens (T, D).
        num_classes: classes.

    Raises:
        ValueError: unknown name or option, a bad value, or a shape the critic cannot take.
    """
    name, options = parse_spec(spec, "critic", _CRITICS)
    dimensions = (2,) if _CRITICS[name] is TokenLinearCritic else (1, 3)
    if len(shape) not in dimensions or min(shape) < 1:
        form = "(T, D)" if 2 in dimensions else "(C, H, W) or (D,), or for tokens critic 'token_linear'"
        raise ValueError(f"critic {name!r}: expected a positive shape {form}, got {tuple(shape)}")
    if num_classes < 1:
        raise ValueError(f"critic {name!r}: num_classes must be at least 1, got {num_classes}")
    return _CRITICS[name](tuple(shape), num_classes, **options)


__all__ = ["Critic", "build", "names"]
