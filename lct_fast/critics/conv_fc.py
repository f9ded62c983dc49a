"""The critic of local critic training."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from lct_fast._init import he_init
from lct_fast.critics.base import Critic, at_least_one, image_shape


class ConvFcCritic(Critic):
    """Convolutions 3x3 with ReLU, no batch norm, no bias; flatten; linear (arXiv 2102.01963, 1805.01128).

    The paper's critic is one convolution of 128 filters at stride 1, and up to five of them in one study.
    `features` stops before the last ReLU, which `activation = "relu"` leaves to whoever applies the head.

    Args:
        shape: (C, H, W), the group's output without the batch.
        num_classes: classes.
        convs: number of convolutions, 1 to 5.
        filters: channels of each.
        stride: of the first convolution; a cheaper critic than the paper's.

    Raises:
        ValueError: shape is not a feature map, convs outside 1..5, filters or stride < 1.
    """

    activation = "relu"

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, *, convs: int = 1, filters: int = 128, stride: int = 1
    ):
        super().__init__()
        channels, height, width = image_shape("conv_fc", shape)
        at_least_one("conv_fc", convs=convs, filters=filters, stride=stride)
        if convs > 5:
            raise ValueError(f"critic 'conv_fc': convs must be 1 to 5, got {convs}")
        self.convs = nn.ModuleList(
            nn.Conv2d(filters if i else channels, filters, 3, 1 if i else stride, padding=1, bias=False)
            for i in range(convs)
        )
        self.head = nn.Linear(filters * -(-height // stride) * -(-width // stride), num_classes)
        he_init(self, self.head)

    def features(self, h: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            h = conv(relu(h) if i else h)
        return h.flatten(1)
