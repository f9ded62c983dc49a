"""Small networks and batches for the engine's tests."""

import torch
from torch import Tensor, nn

import lct_fast as lct


def net(seed: int = 0) -> nn.Sequential:
    """Four units with batch norm, 8x8 images of one channel, five classes."""
    torch.manual_seed(seed)
    return lct.models.build("digits_cnn:width=0.25", 5, 1, 8)


def groups(
    method: lct.Method, count: int = 4, seed: int = 0, critic: str = "pooled_linear"
) -> list[lct.Group]:
    """The network cut at its own places."""
    points = lct.models.default_splits("digits_cnn", count)
    return lct.split(net(seed), example_input=torch.zeros(4, 1, 8, 8), critic=critic, split_points=points)


def batches(count: int, rows: int = 16, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Seeded random images and labels."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 1, 8, 8, generator=g), torch.randint(0, 5, (rows,), generator=g))
        for _ in range(count)
    ]


def state(trainer: lct.Trainer) -> dict[str, Tensor]:
    """Every parameter and buffer of every group, copied."""
    return {f"{k}.{n}": t.clone() for k, g in enumerate(trainer.groups) for n, t in g.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def rows_apart(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """Four units on 8x8 images of one channel, five classes, in which no row depends on another: group norm."""
    torch.manual_seed(seed)
    net = nn.Sequential()
    channels = 1
    for i in range(1, 5):
        unit = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        if dropout:
            unit.append(nn.Dropout(dropout))
        net.add_module(f"unit{i}", unit)
        channels = 8
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(8 * 8 * 8, 5))
    return net


def perceptron(seed: int = 0) -> nn.Sequential:
    """Linear layers on the same images, so that a linear critic's logits come with its group's last layer."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten())
    for i in range(1, 5):
        net.add_module(f"unit{i}", nn.Sequential(nn.Linear(64 if i == 1 else 24, 24), nn.ReLU()))
    net.add_module("head", nn.Linear(24, 5))
    return net
