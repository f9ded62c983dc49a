"""What every critic is: features and a head, honest about batch coupling, refused clearly."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from lct_fast import critics

SPECS = [
    "cnn_aux",
    "conv_fc:filters=6",
    "conv_fc:convs=3,filters=5,stride=2",
    "depthwise:pool=2",
    "depthwise:pool=3,stride=2",
    "linear",
    "mlp_aux",
    "mlp_sr_aux",
    "pooled_linear",
    "pooled_linear:pool=3",
    "shared:channels=6",
]
# Divisible, odd and oblong, smaller than any pooling, a single pixel.
SHAPES = [(4, 8, 8), (3, 7, 9), (2, 2, 2), (5, 1, 1)]


@pytest.fixture(autouse=True)
def _seeded(threads: None) -> None:
    torch.manual_seed(0)


def test_names_lists_every_critic() -> None:
    assert critics.names() == sorted({spec.partition(":")[0] for spec in [*SPECS, "token_linear"]})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_forward_is_head_of_activated_features(spec: str, shape: tuple[int, ...]) -> None:
    critic = critics.build(spec, shape, 7)
    h = torch.randn(3, *shape)
    u = critic.features(h)
    assert u.shape == (3, critic.head.in_features)
    assert u.is_contiguous()
    assert isinstance(critic.head, nn.Linear)
    assert critic.activation in ("none", "relu")
    expected = critic.head(relu(u) if critic.activation == "relu" else u)
    assert expected.shape == (3, 7)
    torch.testing.assert_close(critic(h), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_relu_is_left_to_the_head(spec: str) -> None:
    """With "relu" the features are pre-activations, so some are negative: those that end in ReLU say so."""
    critic, name = critics.build(spec, (4, 8, 8), 3), spec.partition(":")[0]
    assert (critic.features(torch.randn(16, 4, 8, 8)) < 0).any() or name == "depthwise"
    assert (critic.activation == "relu") == (name in ("conv_fc", "mlp_aux", "mlp_sr_aux", "shared"))


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_reach_input_and_parameters(spec: str) -> None:
    critic = critics.build(spec, (3, 7, 9), 5)
    h = torch.randn(6, 3, 7, 9, requires_grad=True)
    critic(h).square().sum().backward()
    assert h.grad is not None
    assert (h.grad.flatten(1).abs().amax(1) > 0).all()
    for name, parameter in critic.named_parameters():
        if not parameter.requires_grad:
            assert spec.startswith("shared") and name.startswith("head."), name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("spec", SPECS)
def test_row_independent_is_the_truth(spec: str) -> None:
    """In training mode another row's values reach a row's logits exactly where the critic says so."""
    critic = critics.build(spec, (4, 8, 8), 5).double()
    h = torch.randn(5, 4, 8, 8, dtype=torch.float64)
    before = critic(h)
    h[0] = 3 * torch.randn(4, 8, 8, dtype=torch.float64) + 1
    after = critic(h)
    moved = (after[1:] - before[1:]).abs().max()
    assert (after[0] - before[0]).abs().max() > 1e-3
    assert moved < 1e-12 if critic.row_independent else moved > 1e-3


@pytest.mark.parametrize("spec", SPECS)
def test_float64_and_channels_last(spec: str) -> None:
    critic = critics.build(spec, (4, 8, 8), 5)
    h = torch.randn(3, 4, 8, 8)
    wide = copy.deepcopy(critic).double()(h.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(critic(h), wide.float(), rtol=1e-4, atol=1e-4)
    last = critic.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        last(h.to(memory_format=torch.channels_last)), wide.float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("spec", SPECS)
def test_state_dict_round_trip(spec: str) -> None:
    one, other = (critics.build(spec, (4, 8, 8), 5).eval() for _ in range(2))
    h = torch.randn(3, 4, 8, 8)
    assert not torch.equal(one(h), other(h))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(h), other(h))
    assert {"head.weight", "head.bias"} <= set(one.state_dict())


def test_state_dict_names_are_stable() -> None:
    """Names in users' checkpoints: a rename has to be seen here first."""
    assert list(critics.build("conv_fc:convs=2", (4, 8, 8), 5).state_dict()) == [
        "convs.0.weight",
        "convs.1.weight",
        "head.weight",
        "head.bias",
    ]
    assert [n for n, _ in critics.build("mlp_sr_aux:convs=1,layers=1", (4, 8, 8), 5).named_parameters()] == [
        "convs.0.weight",
        "convs.1.weight",
        "convs.1.bias",
        "mlp.0.weight",
        "mlp.1.weight",
        "mlp.1.bias",
        "head.weight",
        "head.bias",
    ]


def test_linear_takes_vectors() -> None:
    critic = critics.build("linear", (12,), 5)
    h = torch.randn(3, 12)
    assert torch.equal(critic.features(h), h)
    assert critic(h).shape == (3, 5)


@pytest.mark.parametrize("name", sorted(set(critics.names()) - {"linear", "token_linear"}))
def test_others_refuse_vectors(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"critic '{name}' needs a feature map \(C, H, W\), got shape \(12,\)"
    ):
        critics.build(name, (12,), 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("conv", "unknown critic 'conv'.*choose one of cnn_aux, conv_fc, depthwise, linear"),
        ("conv_fc:width=2", "no option 'width'; its options and defaults: convs=1, filters=128, stride=1"),
        ("linear:pool=2", "critic 'linear' has no option 'pool'; its options and defaults: none"),
        ("conv_fc:convs=many", "option 'convs' expects int, got 'many'"),
        ("conv_fc:convs=6", "convs must be 1 to 5, got 6"),
        ("conv_fc:convs=0", "convs must be at least 1, got 0"),
        ("conv_fc:filters=0", "filters must be at least 1"),
        ("conv_fc:stride=-1", "stride must be at least 1"),
        ("pooled_linear:pool=0", "pool must be at least 1"),
        ("depthwise:stride=0", "stride must be at least 1, got 0"),
        ("shared:channels=0", "channels must be at least 1, got 0"),
        ("cnn_aux:convs=0", "convs must be at least 1"),
        ("mlp_aux:layers=0", "layers must be at least 1"),
        ("mlp_sr_aux:convs=0", "convs must be at least 1"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        critics.build(spec, (4, 8, 8), 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (4, 8), (1, 4, 8, 8), (4, 0, 8)], ids=str)
def test_bad_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a positive shape"):
        critics.build("linear", shape, 5)


def test_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        critics.build("linear", (4,), 0)
