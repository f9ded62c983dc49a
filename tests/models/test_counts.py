"""Parameters and multiply-accumulates against the figures of the papers."""

import pytest
import torch
from torch import nn

from lct_fast import critics, models
from lct_fast.models.macs import macs


def _million(module: nn.Module, norm: bool = True) -> float:
    named = module.named_parameters()
    return sum(p.numel() for name, p in named if norm or "norm" not in name) / 1e6


# arXiv 2102.01963: 7.862 M, sub-models 1.423 / 0.882 / 2.259 M, batch norm not counted. MACs are derived from
# the same shapes: 116 / 172 / 247 / 323 M.
EXITS = {1: (2, 1.423, 116), 2: (5, 0.882, 172), 3: (8, 2.259, 247)}


def test_lct_vgg_has_the_papers_parameters() -> None:
    net = models.build("lct_vgg", 10)
    assert round(_million(net, norm=False), 3) == 7.862
    assert round(macs(net, (3, 32, 32)) / 1e6) == 323


@pytest.mark.parametrize("k", EXITS)
def test_lct_exits_have_the_papers_parameters(k: int) -> None:
    convs, million, mega_macs = EXITS[k]
    net = models.build("lct_vgg", 10)
    assert models.default_splits("lct_vgg", 4)[k - 1] == f"conv{convs + 1}"
    group = net[:convs]
    shape = tuple(group(torch.zeros(2, 3, 32, 32)).shape[1:])
    sub_model = nn.Sequential(*group, critics.build("conv_fc", shape, 10))
    assert round(_million(sub_model, norm=False), 3) == million
    assert round(macs(sub_model, (3, 32, 32)) / 1e6) == mega_macs


@pytest.mark.parametrize(
    ("spec", "million"),
    [
        ("preact_resnet18", 11.17),
        ("preact_resnet34", 21.28),
        ("preact_resnet50", 23.51),
        ("preact_resnet101", 42.51),
        ("preact_resnet110", 1.73),
        ("preact_resnet152", 58.15),
        # arXiv 1605.07146, table 4: 36.5 M, 17.1 M, 11.0 M, 8.9 M.
        ("wide_resnet", 36.48),
        ("wide_resnet:depth=16,widen=10", 17.12),
        ("wide_resnet:depth=16,widen=8", 10.96),
        ("wide_resnet:depth=40,widen=4", 8.95),
    ],
)
def test_known_parameter_counts(spec: str, million: float) -> None:
    with torch.device("meta"):
        assert round(_million(models.build(spec, 10)), 2) == million


def test_resnet_depths_count_their_layers() -> None:
    """The number in a name counts stem, block convolutions and head, not shortcuts."""
    for name in models.names():
        if name.startswith("preact_resnet"):
            with torch.device("meta"):
                net = models.build(name, 10)
            kinds = (nn.Conv2d, nn.Linear)
            layers = [n for n, part in net.named_modules() if isinstance(part, kinds) and "shortcut" not in n]
            assert f"preact_resnet{len(layers)}" == name


# arXiv 2106.06401: MACs of the auxiliary networks against the largest layer of its CIFAR network.
@pytest.mark.parametrize(
    ("critic", "smallest", "largest"),
    [("cnn_aux", 200, 200), ("mlp_aux", 0.5, 8.3), ("mlp_sr_aux", 2.6, 10.4)],
)
def test_auxiliary_networks_cost_what_the_paper_says(critic: str, smallest: float, largest: float) -> None:
    shape, layers, heads = (3, 32, 32), [], []
    with torch.device("meta"):
        for unit in models.build("dgl_cnn", 10)[:6]:
            layers.append(macs(unit, shape))
            shape = tuple(unit(torch.zeros(2, *shape)).shape[1:])
            heads.append(macs(critics.build(critic, shape, 10), shape))
    assert max(layers) == 9 * 512 * 512 * 8 * 8
    percent = [100 * cost / max(layers) for cost in heads]
    # The output layer's 4C x 10 is not in the paper's figures: under 0.02 %.
    assert min(percent) == pytest.approx(smallest, abs=0.05)
    assert max(percent) == pytest.approx(largest, abs=0.05)


def test_macs_of_known_layers() -> None:
    assert macs(nn.Linear(3, 5), (3,)) == 15
    assert macs(nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 7)) == 9 * 2 * 6 * 5 * 7
    assert macs(nn.ReLU(), (3,)) == 0
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    # q, k, v and output projections, scores and weighted sum, feed-forward; 5 tokens.
    assert macs(attention, (5, 8)) == 5 * 4 * 8 * 8 + 2 * 5 * 5 * 8 + 5 * 2 * 8 * 16


def test_macs_changes_nothing() -> None:
    net = models.build("digits_cnn", 10, in_channels=1, image_size=8)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    macs(net, (1, 8, 8))
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
