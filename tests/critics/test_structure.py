"""The critics' layers, against the papers' recipes written out in torch."""

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, linear, relu

from lct_fast import critics
from lct_fast.critics.pooling import pool_to


@pytest.fixture(autouse=True)
def _seeded(threads: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (4, 6), (5, 4)], ids=str)
def test_pooling_is_adaptive_average_pooling(size: tuple[int, int], side: int) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    ours, theirs = pool_to(x, side), adaptive_avg_pool2d(x, side)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    (got,) = torch.autograd.grad((ours * weights).sum(), x)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), x)
    torch.testing.assert_close(got, expected)


def test_pooling_leaves_a_small_map_alone() -> None:
    x = torch.randn(2, 3, 2, 2)
    assert pool_to(x, 4) is x
    assert pool_to(torch.randn(2, 3, 2, 8), 4).shape == (2, 3, 2, 4)


@pytest.mark.parametrize(("convs", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_conv_fc_is_the_papers_critic(convs: int, stride: int) -> None:
    critic = critics.build(f"conv_fc:convs={convs},filters=6,stride={stride}", (4, 5, 7), 3)
    h = torch.randn(2, 4, 5, 7)
    a = h
    for i, conv in enumerate(critic.convs):
        assert conv.bias is None
        a = relu(conv2d(a, conv.weight, stride=1 if i else stride, padding=1))
    torch.testing.assert_close(critic(h), linear(a.flatten(1), critic.head.weight, critic.head.bias))
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in critic.modules())


def test_pooled_linear_is_pooling_and_a_linear_layer() -> None:
    critic = critics.build("pooled_linear:pool=4", (3, 8, 8), 5)
    h = torch.randn(2, 3, 8, 8)
    pooled = adaptive_avg_pool2d(h, 4).flatten(1)
    torch.testing.assert_close(critic(h), linear(pooled, critic.head.weight, critic.head.bias))


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_is_a_convolution_of_each_channel_pooling_and_a_linear_layer(stride: int) -> None:
    critic = critics.build(f"depthwise:pool=2,stride={stride}", (3, 8, 6), 5)
    h = torch.randn(2, 3, 8, 6)
    maps = [conv2d(h[:, c : c + 1], critic.conv.weight[c : c + 1], None, stride, 1) for c in range(3)]
    pooled = adaptive_avg_pool2d(relu(torch.cat(maps, 1)), 2).flatten(1)
    torch.testing.assert_close(critic(h), linear(pooled, critic.head.weight, critic.head.bias))


def test_shared_is_a_projection_of_the_cut_and_one_head_for_all() -> None:
    torch.manual_seed(1)
    one = critics.build("shared:pool=2,channels=5", (3, 8, 8), 4)
    torch.manual_seed(2)
    other = critics.build("shared:pool=2,channels=5", (9, 4, 4), 4)
    assert torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(one.project.weight[:, :1], other.project.weight[:, :1])
    h = torch.randn(2, 3, 8, 8)
    u = conv2d(adaptive_avg_pool2d(h, 2), one.project.weight, one.project.bias).flatten(1)
    torch.testing.assert_close(one(h), linear(relu(u), one.head.weight))
    # Logits of a wide head have about the features' own scale.
    wide = critics.build("shared:pool=4,channels=256", (3, 8, 8), 4).head.weight
    assert wide.std() * wide.shape[1] ** 0.5 == pytest.approx(1, abs=0.05)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Batch norm in training mode at scale 1, shift 0."""
    dims = [d for d in range(x.dim()) if d != 1]
    var = x.var(dims, unbiased=False, keepdim=True)
    return (x - x.mean(dims, keepdim=True)) / (var + 1e-5).sqrt()


def _weights(part: nn.Module, kind: type[nn.Conv2d] | type[nn.Linear]) -> list[torch.Tensor]:
    return [layer.weight for layer in part.modules() if isinstance(layer, kind)]


@pytest.mark.parametrize("size", [8, 12])
def test_greedy_auxiliary_networks_are_the_papers(size: int) -> None:
    """Two 3x3 convs | pool, three linear | quarter-resolution pool, three 1x1 convs, pool, three linear."""
    h = torch.randn(6, 4, size, size, dtype=torch.float64)

    cnn = critics.build("cnn_aux", h.shape[1:], 3).double()
    a = h
    for weight in _weights(cnn.convs, nn.Conv2d):
        a = relu(_norm(conv2d(a, weight, padding=1)))
    u = _norm(adaptive_avg_pool2d(a, 2)).flatten(1)
    torch.testing.assert_close(cnn(h), linear(u, cnn.head.weight, cnn.head.bias))
    assert len(_weights(cnn, nn.Conv2d)) == 2

    mlp = critics.build("mlp_aux", h.shape[1:], 3).double()
    a = adaptive_avg_pool2d(h, 2).flatten(1)
    for weight in _weights(mlp.mlp, nn.Linear):
        assert weight.shape == (16, 16)
        a = relu(_norm(linear(a, weight)))
    torch.testing.assert_close(mlp(h), linear(a, mlp.head.weight, mlp.head.bias))
    assert len(_weights(mlp.mlp, nn.Linear)) == 3

    staged = critics.build("mlp_sr_aux", h.shape[1:], 3).double()
    a = adaptive_avg_pool2d(h, size // 4)
    for weight in _weights(staged.convs, nn.Conv2d):
        assert weight.shape == (4, 4, 1, 1)
        a = relu(_norm(conv2d(a, weight)))
    a = adaptive_avg_pool2d(a, 2).flatten(1)
    for weight in _weights(staged.mlp, nn.Linear):
        a = relu(_norm(linear(a, weight)))
    torch.testing.assert_close(staged(h), linear(a, staged.head.weight, staged.head.bias))
    assert len(_weights(staged.convs, nn.Conv2d)) == len(_weights(staged.mlp, nn.Linear)) == 3
