"""What every model is: named units, logits, trainable everywhere, scaled by width, refused clearly."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import relu

from lct_fast import models

# Small enough that every architecture trains a step in well under a second.
SMALL = {
    "dgl_cnn": "dgl_cnn:width=0.0625",
    "digits_cnn": "digits_cnn:width=0.25",
    "lct_vgg": "lct_vgg:width=0.125",
    "mlp": "mlp:hidden=16",
    "preact_resnet101": "preact_resnet101:width=0.0625",
    "preact_resnet110": "preact_resnet110:width=0.25",
    "preact_resnet152": "preact_resnet152:width=0.0625",
    "preact_resnet18": "preact_resnet18:width=0.0625",
    "preact_resnet34": "preact_resnet34:width=0.0625",
    "preact_resnet50": "preact_resnet50:width=0.0625",
    "resnet5": "resnet5:width=0.5",
    "vgg8": "vgg8:width=0.0625",
    "wide_resnet": "wide_resnet:width=0.25,widen=2",
}


@pytest.fixture(autouse=True)
def _seeded(threads: None) -> None:
    torch.manual_seed(0)


def test_names_lists_every_model() -> None:
    assert models.names() == sorted(SMALL)


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_logits_and_gradients(spec: str) -> None:
    net = models.build(spec, 7, in_channels=2, image_size=11)
    logits = net(torch.randn(3, 2, 11, 11))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A batch norm's scale of one dead unit may be zero, a whole tensor may not.
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_float64(spec: str) -> None:
    # Not in training mode: batch statistics of three 1x1 maps magnify rounding without bound.
    net = models.build(spec, 4, image_size=8).eval()
    x = torch.randn(3, 3, 8, 8)
    wide = copy.deepcopy(net).double()(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(net(x), wide.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_units_compose_to_the_whole(spec: str) -> None:
    """A cut can stand after any unit, also inside a stage: running unit by unit is running the network."""
    net = models.build(spec, 4, image_size=8).eval()
    x = torch.randn(2, 3, 8, 8)
    h = x
    for stage in net:
        for unit in stage if type(stage) is nn.Sequential else [stage]:
            assert type(unit) is not nn.Sequential
            h = unit(h)
    assert torch.equal(h, net(x))
    assert list(dict(net.named_children()))[-1] == "head"
    assert isinstance(net.head, nn.Linear)


@pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL)
def test_state_dict_round_trip(spec: str) -> None:
    net = models.build(spec, 4, image_size=8).eval()
    other = models.build(spec, 4, image_size=8).eval()
    state = net.state_dict()
    assert all(type(value) is torch.Tensor for value in state.values())
    assert {name.split(".")[0] for name in state} <= set(dict(net.named_children()))
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), net(x))


def test_state_dict_names_are_stable() -> None:
    """Names in users' checkpoints: a rename has to be seen here first."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    unit = ["conv.weight", *(f"norm.{part}" for part in norm)]
    vgg = [f"conv{i}.{part}" for i in range(1, 12) for part in unit] + ["head.weight", "head.bias"]
    assert list(models.build("lct_vgg:width=0.125", 10).state_dict()) == vgg
    resnet = models.build("preact_resnet18:width=0.0625", 10).state_dict()
    first = [f"layer2.0.{part}" for part in ("conv1.weight", "conv2.weight", "shortcut.weight")]
    assert [name for name in resnet if name.startswith("layer2.0.") and "norm" not in name] == first
    assert [name for name in resnet if not name.startswith("layer")] == [
        "stem.weight",
        *(f"pool.norm.{part}" for part in norm),
        "head.weight",
        "head.bias",
    ]
    assert list(models.build("mlp:hidden=4,depth=2", 10).state_dict()) == [
        "fc1.linear.weight",
        "fc1.linear.bias",
        "fc2.linear.weight",
        "fc2.linear.bias",
        "head.weight",
        "head.bias",
    ]


@pytest.mark.parametrize("name", models.names())
def test_width_scales_every_layer(name: str) -> None:
    """Half the width: about a quarter of the parameters, less what hangs on input channels and classes."""
    with torch.device("meta"):
        whole, half = (models.build(f"{name}:width={w}", 10) for w in (1, 0.5))
    for big, small in zip(whole.modules(), half.modules(), strict=True):
        if isinstance(big, nn.Conv2d):
            assert small.out_channels * 2 == big.out_channels
        elif isinstance(big, nn.Linear) and big is not whole.head:
            assert small.out_features * 2 == big.out_features


@pytest.mark.parametrize("name", ["digits_cnn", "lct_vgg", "dgl_cnn", "mlp"])
def test_without_batch_norm_rows_are_independent(name: str) -> None:
    net = models.build(f"{name}:norm=none,width=0.0625", 4, image_size=8)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in net.modules())
    x = torch.randn(3, 3, 8, 8)
    before = net(x)
    x[0] += 1
    after = net(x)
    torch.testing.assert_close(before[1:], after[1:])
    assert (before[0] - after[0]).abs().max() > 1e-3


def test_he_init() -> None:
    """Variance 2 / fan_in in front of a ReLU, 1 / fan_in in the head, within five standard errors."""
    net = models.build("lct_vgg:norm=none", 10)
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and name != "conv1.conv":
            fan_in = layer.weight[0].numel()
            gain = 1 if name == "head" else 2
            assert layer.weight.square().mean().item() * fan_in == pytest.approx(gain, rel=0.04), name
            assert not layer.bias.any(), name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", "unknown model 'resnet18'.*choose one of dgl_cnn, digits_cnn"),
        ("lct_vgg:wdith=1", "no option 'wdith'; its options and defaults: width=1.0, norm=batch"),
        ("lct_vgg:width=thin", "option 'width' expects float, got 'thin'"),
        ("lct_vgg:width=0", "width must be a positive number, got 0.0"),
        ("lct_vgg:width=-1", "width must be a positive number"),
        ("lct_vgg:width=nan", "width must be a positive number"),
        ("lct_vgg:width", "expected key=value after the colon, got 'width'"),
        ("lct_vgg:width=1,,", "expected key=value after the colon, got ''"),
        ("lct_vgg:width=1,width=2", "option 'width' is given twice"),
        ("lct_vgg:norm=layer", "norm must be 'batch' or 'none', got 'layer'"),
        ("mlp:depth=2.5", "option 'depth' expects int, got '2.5'"),
        ("mlp:depth=0", "hidden and depth must be at least 1"),
        ("mlp:norm=layer", "norm must be 'batch' or 'none'"),
        ("wide_resnet:depth=27", r"depth must be 10, 16, 22, 28, ... \(6 n \+ 4\), got 27"),
        ("wide_resnet:widen=0", "widen must be at least 1"),
    ],
)
def test_bad_specs_are_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        models.build(spec, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "smallest"), [("lct_vgg", 8), ("digits_cnn", 8), ("dgl_cnn", 8), ("preact_resnet18", 8)]
    + [("preact_resnet110", 4), ("wide_resnet", 4)],
)  # fmt: skip
def test_small_images_are_refused(name: str, smallest: int) -> None:
    with torch.device("meta"):
        models.build(name, 10, image_size=smallest)
        with pytest.raises(ValueError, match=f"at least {smallest} pixels a side, got {smallest - 1}"):
            models.build(name, 10, image_size=smallest - 1)


@pytest.mark.parametrize("what", ["num_classes", "in_channels", "image_size"])
def test_empty_sizes_are_refused(what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} must be at least 1, got 0"):
        models.build("mlp", **{"num_classes": 2, what: 0})


def test_spec_ignores_spaces() -> None:
    net = models.build(" mlp : hidden = 8 , depth = 1 ", 2, in_channels=1, image_size=3)
    assert [tuple(p.shape) for p in net.parameters()] == [(8, 9), (8,), (2, 8), (2,)]


@pytest.mark.parametrize(("name", "last"), [("preact_resnet18", "conv2"), ("preact_resnet50", "conv3")])
def test_residual_blocks_pass_their_input_on(name: str, last: str) -> None:
    """Pre-activation: with a silent last convolution a block is its shortcut, identity or projection."""
    stage = models.build(f"{name}:width=0.0625", 10).layer2
    x = torch.randn(2, stage[0].conv1.in_channels, 6, 6)
    for block in stage:
        nn.init.zeros_(block.get_submodule(last).weight)
        first = relu(block.norm1(x))
        expected = x if block.shortcut is None else block.shortcut(first)
        x = block(x)
        assert torch.equal(x, expected)
    assert x.shape[2:] == (3, 3)
    assert stage[0].shortcut is not None
    assert stage[1].shortcut is None
