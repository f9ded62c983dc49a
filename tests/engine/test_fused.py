"""Groups that share passes with their critic's pool: the same arithmetic, and only where it is the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lct_fast as lct
from lct_fast import critics
from lct_fast.critics.pooling import pool_to
from lct_fast.engine.network.fused import fuse
from tests.engine import nets


class Unit(nn.Module):
    """Convolution, batch norm and an end of somebody's own."""

    def __init__(self, end: Callable[[Any, Tensor], Tensor], **norm: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4, **norm)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, self.conv(x))


def _layers(unit: nn.Module) -> nn.Module:
    """Of the first group of a network that begins with the unit."""
    model = nn.Sequential(unit, nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 2))
    (first, _) = lct.split(model, example_input=torch.zeros(2, 3, 8, 8), split_points=["1"])
    return first.layers


def _pools(side: int) -> critics.Critic:
    return critics.build(f"pooled_linear:pool={side}", (4, 8, 8), 2)


ENDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.relu": lambda m, x: F.relu(m.norm(x)),
    "in place": lambda m, x: F.relu(m.norm(x), inplace=True),
    "torch.relu": lambda m, x: torch.relu(m.norm(x)),
    "method": lambda m, x: m.norm(x).relu(),
    "module": lambda m, x: m.act(m.norm(x)),
}
OTHER_ENDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no ReLU": lambda m, x: m.norm(x),
    "no norm": lambda m, x: F.relu(x),
    "another activation": lambda m, x: F.gelu(m.norm(x)),
    "something behind it": lambda m, x: F.relu(m.norm(x)) * 2,
    "dropout behind it": lambda m, x: m.drop(F.relu(m.norm(x))),
    "ReLU used twice": lambda m, x: (lambda y: F.relu(y) + y)(m.norm(x)),
    "norm used beside": lambda m, x: (lambda y: (y * 2, F.relu(y))[1])(m.norm(x)),
    "ReLU used beside": lambda m, x: (lambda y: (y * 2, y)[1])(F.relu(m.norm(x))),
    "depends on data": lambda m, x: F.relu(m.norm(x)) if float(x.detach().sum()) != 0 else x,
    "depends on chance": lambda m, x: F.relu(m.norm(x)) if random.random() < 2 else x,
    "depends on torch's chance": lambda m, x: F.relu(m.norm(x)) if torch.rand(1) < 2 else x,
}
SHARED = {
    "unit": lambda: Unit(ENDS["F.relu"]),
    "sequential": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize("end", ENDS)
def test_batch_norm_and_relu_are_recognised(end: str) -> None:
    assert fuse(_layers(Unit(ENDS[end])), _pools(2)) is not None


@pytest.mark.parametrize("end", OTHER_ENDS)
def test_other_ends_are_left_as_they_are(end: str) -> None:
    critic = _pools(2)
    states = random.getstate(), torch.get_rng_state()
    layers = _layers(Unit(OTHER_ENDS[end]))
    random.setstate(states[0])
    torch.set_rng_state(states[1])
    assert fuse(layers, critic) is None
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}], ids=str)
def test_batch_norms_the_op_cannot_stand_for_are_left(options: dict[str, Any]) -> None:
    assert fuse(_layers(Unit(ENDS["F.relu"], **options)), _pools(2)) is None


class SubclassedNorm(nn.BatchNorm2d):
    pass


def test_a_subclass_of_batch_norm_is_left() -> None:
    unit = Unit(ENDS["F.relu"])
    unit.norm = SubclassedNorm(4)
    assert fuse(_layers(unit), _pools(2)) is None


@pytest.mark.parametrize("make", SHARED.values(), ids=list(SHARED))
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [1, 2, 3, 16], ids="pool {}".format)
def test_output_pool_gradients_and_statistics_are_those_of_the_layers(
    make: Callable[[], nn.Module], channels_last: bool, side: int
) -> None:
    """Sides 3 and 16 do not divide the map into squares of their own: one falls back, one is the map itself."""
    torch.manual_seed(0)
    plain = _layers(make()).double()
    shared_layers = copy.deepcopy(plain)
    shared = fuse(shared_layers, _pools(side))
    assert shared is not None
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    for train in (True, False):
        plain.train(train)
        shared_layers.train(train)
        h = plain(x)
        pooled = pool_to(h, side)
        got_h, got_pooled = shared(x)
        torch.testing.assert_close(got_h, h)
        torch.testing.assert_close(got_pooled, pooled)
        weight = torch.randn_like(pooled)
        for module, out in ((plain, pooled), (shared_layers, got_pooled)):
            module.zero_grad()
            (out * weight).sum().backward()
        ours, theirs = dict(shared_layers.named_parameters()), dict(plain.named_parameters())
        assert ours.keys() == theirs.keys() and ours
        for name, parameter in theirs.items():
            assert parameter.grad is not None and ours[name].grad is not None
            torch.testing.assert_close(ours[name].grad, parameter.grad)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(shared_layers.state_dict()[name], value)


def test_a_map_of_another_size_than_expected_is_pooled_all_the_same() -> None:
    shared = fuse(_layers(Unit(ENDS["F.relu"])), _pools(2))
    assert shared is not None
    h, pooled = shared(torch.randn(2, 3, 7, 10))
    torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(h, 2))


def test_hooks_and_forwards_of_ones_own_are_called() -> None:
    (group, _) = nets.groups(lct.Greedy(), 2)
    assert group.fused is not None
    unit = group.fused.bypassed[0]
    for module in group.fused.bypassed:
        handle = module.register_forward_hook(lambda *_: None)
        assert group.fused is None
        handle.remove()
        assert group.fused is not None
    calls = []
    own = unit.forward
    unit.forward = lambda x: calls.append(1) or own(x)  # type: ignore[method-assign,func-returns-value]
    x, y = nets.batches(1)[0]
    lct.Trainer([group, _], lct.Greedy()).step(x, y)
    assert group.fused is None and calls


def test_critics_that_begin_with_a_pool_share_it_and_others_do_not() -> None:
    shares = {
        "pooled_linear": True,
        "mlp_aux": True,
        "mlp_sr_aux": True,
        "cnn_aux": False,
        "linear": False,
        "conv_fc:filters=4": False,
    }
    for critic, expected in shares.items():
        groups = nets.groups(lct.Greedy(), 2, critic=critic)
        assert (groups[0].fused is not None) == expected, critic
        assert groups[1].fused is None
        assert not any("fused" in name for name in groups[0].state_dict())


@pytest.mark.parametrize(
    ("method", "critic"),
    [
        (lct.LocalCritic, "pooled_linear"),
        (lct.LocalCritic, "pooled_linear:pool=4"),
        (lct.Greedy, "pooled_linear"),
        (lct.Greedy, "mlp_aux"),
        (lct.Greedy, "mlp_sr_aux"),
    ],
)
def test_training_is_the_same_with_and_without(method: type[lct.Method], critic: str) -> None:
    states = []
    for shared in (True, False):
        groups = nets.groups(method(), critic=critic)
        for group in groups[:-1]:
            assert group.fused is not None
            if not shared:
                group.fused.bypassed[0].register_forward_hook(lambda *_: None)
                assert group.fused is None
        for group in groups:
            group.double()
        trainer = lct.Trainer(groups, method())
        for x, y in nets.batches(3):
            trainer.step(x.double(), y)
        trainer.flush()
        states.append(nets.state(trainer))
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-8, atol=1e-10, msg=name)


def test_it_runs_compiled() -> None:
    """The op is opaque to the compiler; what is around it is compiled."""
    x, y = nets.batches(1)[0]
    losses = []
    for compile in (False, True):
        groups = nets.groups(lct.Greedy(), 2)
        losses.append(lct.Trainer(groups, lct.Greedy(), compile=compile).step(x, y).losses)
    torch.testing.assert_close(losses[0], losses[1])


def test_every_group_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beyond the number of versions that torch keeps of one piece of code."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: real(module, backend="eager"))
    torch.compiler.reset()
    x, y = nets.batches(1)[0]
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(2):
            groups = nets.groups(lct.Greedy())
            assert sum(group.fused is not None for group in groups) == 3
            lct.Trainer(groups, lct.Greedy(), compile=True).step(x, y)


def _convolved(unit: Unit, watch: list[Tensor]) -> Tensor:
    """The convolution's output after the backward pass, seen through a view that no hook shows."""
    shared = fuse(_layers(unit), _pools(2))
    assert shared is not None
    tail = shared.graph_module.tail
    torch.manual_seed(0)
    own = tail.forward
    tail.forward = lambda x: watch.append(x.detach()) or own(x)
    h, pooled = shared(torch.randn(2, 3, 8, 8))
    before = watch[0].clone()
    pooled.sum().backward()
    return watch[0] - before


def test_the_gradient_is_written_over_what_a_convolution_alone_gave() -> None:
    twice = {"used beside": lambda m, x: (lambda z: (z * 2, F.relu(m.norm(z)))[1])(x)}
    assert _convolved(Unit(ENDS["F.relu"]), []).abs().sum() > 0
    assert not _convolved(Unit(twice["used beside"]), []).any()
    assert not _convolved(Unit(lambda m, x: F.relu(m.norm(x.exp()))), []).any(), "exp keeps its output"
    unit = Unit(ENDS["F.relu"])
    unit.conv.register_forward_hook(lambda *_: None)
    assert not _convolved(unit, []).any()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    (group, _) = nets.groups(lct.Greedy(), 2)
    assert group.fused is None
    handle.remove()
    assert group.fused is not None


class Dense(nn.Module):
    """A linear layer and an end of somebody's own."""

    def __init__(self, end: Callable[[Any, Tensor], Tensor], inputs: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 5)
        self.norm = nn.Identity()
        self.act = nn.GELU()
        self.tanh = nn.GELU("tanh")
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, self.linear(x.flatten(1)))


DENSE_ENDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "relu": lambda m, x: F.relu(m.norm(x)),
    "none": lambda m, x: m.norm(x),
    "F.gelu": lambda m, x: F.gelu(x),
    "GELU": lambda m, x: m.act(x),
}
OTHER_DENSE_ENDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tanh's GELU": lambda m, x: m.tanh(x),
    "tanh's gelu": lambda m, x: F.gelu(x, approximate="tanh"),
    "another activation": lambda m, x: F.silu(x),
    "used beside": lambda m, x: (x * 2, F.relu(x))[1],
}


def _dense(end: Callable[[Any, Tensor], Tensor], critic: str = "linear", classes: int = 3) -> list[lct.Group]:
    torch.manual_seed(0)
    model = nn.Sequential(Dense(end), Dense(end, 5), nn.Linear(5, classes))
    return lct.split(model, example_input=torch.zeros(4, 2, 3), critic=critic, split_points=["1", "2"])


def test_linear_ends_give_the_critics_logits() -> None:
    for end in DENSE_ENDS.values():
        groups = _dense(end)
        for group in groups[:-1]:
            assert group.fused is not None and group.fused.gives_logits
        x = torch.randn(7, 2, 3)
        h, logits = groups[0].fused(x)  # type: ignore[misc]
        torch.testing.assert_close(h, groups[0].layers(x))
        torch.testing.assert_close(logits, groups[0].critic(h))


def test_other_linear_ends_are_left() -> None:
    for name, end in OTHER_DENSE_ENDS.items():
        assert _dense(end)[0].fused is None, name
    assert _dense(DENSE_ENDS["relu"], classes=64)[0].fused is None
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.Flatten(), nn.Linear(30, 3)))
    (rows, _) = lct.split(model, example_input=torch.zeros(4, 2, 3, 3), critic="linear", split_points=["1"])
    assert rows.fused is None, "the critic reads more than a row of the layer's output"
    with torch.autocast("cpu", torch.bfloat16):
        assert _dense(DENSE_ENDS["relu"])[0].fused is None


@pytest.mark.parametrize("method", [lct.LocalCritic, lct.Greedy])
@pytest.mark.parametrize("end", DENSE_ENDS)
def test_linear_ends_train_as_without(end: str, method: type[lct.Method]) -> None:
    """Rows that count for nothing included."""
    states, losses = [], []
    draw = torch.Generator().manual_seed(3)
    batches = [
        (torch.randn(9, 2, 3, generator=draw).double(), torch.randint(-1, 3, (9,), generator=draw))
        for _ in range(4)
    ]
    for shared in (True, False):
        groups = _dense(DENSE_ENDS[end])
        for group in groups:
            group.double()
        for group in groups[:-1]:
            assert group.fused is not None
            if not shared:
                group.fused.bypassed[0].register_forward_hook(lambda *_: None)
                assert group.fused is None
        # Adam would hide a factor in a critic's gradient.
        critics_sgd = {"critic_optimizer": lambda p: torch.optim.SGD(p, 0.1)}
        options = critics_sgd if method is lct.LocalCritic else {}
        trainer = lct.Trainer(groups, method(**options), feedback_delay=1, ignore_index=-1)
        losses.append(torch.stack([trainer.step(x, y).losses for x, y in batches]))
        trainer.flush()
        states.append(nets.state(trainer))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-6, atol=1e-8, msg=name)
