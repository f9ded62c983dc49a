"""Weight initialisation shared by models and critics."""

from __future__ import annotations

from torch import nn


def he_init(module: nn.Module, head: nn.Linear | None = None) -> None:
    """He initialisation (arXiv 1502.01852) of every convolution and linear layer in `module`, in place.

    Weights are normal with variance 2 / fan_in, so that activations keep their scale through conv + ReLU
    even in nets without batch norm (fan_out changes it wherever the channel count does). `head`, which no
    ReLU follows, gets 1 / fan_in. Biases start at 0; batch norm keeps torch's scale 1 and shift 0.
    """
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(part.weight, nonlinearity="linear" if part is head else "relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
