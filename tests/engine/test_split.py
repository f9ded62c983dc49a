"""Cutting models: where, balanced how, and what is refused."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.engine.network.group import exit_module
from lct_fast.engine.network.split import _partition


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class UserNet(nn.Module):
    """A model in the usual style: named submodules, and operations between them in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.layer2 = nn.Sequential(Block(8), Block(8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(x.mean((2, 3)), 1))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _through(groups: list[lct.Group], x: Tensor) -> Tensor:
    for group in groups[:-1]:
        x = group.layers(x)
    return groups[-1].critic(groups[-1].layers(x))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_groups_in_a_row_are_the_model(count: int) -> None:
    model = UserNet().eval()
    groups = lct.split(model, count, X)
    assert len(groups) == count
    torch.testing.assert_close(_through(groups, X), model(X), rtol=0, atol=0)
    shared = {id(p) for p in model.parameters()}
    assert shared == {id(p) for g in groups for p in (g if g.last else g.layers).parameters()}


def test_split_points_name_the_modules_that_start_groups() -> None:
    groups = lct.split(UserNet(), example_input=X, split_points=["layer1.1", "layer2"])
    assert [g.units for g in groups] == [
        ["conv1", "bn1", "layer1.0"],
        ["layer1.1"],
        ["layer2.0", "layer2.1", "fc"],
    ]
    assert [g.shape for g in groups] == [(8, 8, 8), (8, 8, 8), (10,)]


def test_a_cut_never_parts_convolution_from_its_norm() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    assert [g.units[0] for g in lct.split(model, 3, X)] == ["0", "3", "6"]


def test_splitting_leaves_model_and_random_state_alone() -> None:
    model = UserNet()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    groups = lct.split(model, 2, X, critic="linear")
    after = torch.get_rng_state()
    # Only the one critic that is used draws; timing others does not.
    torch.set_rng_state(state)
    again = lct.critics.build("linear", groups[0].shape, 10)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(again.head.weight, groups[0].critic.head.weight)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training


def test_partition_minimises_the_slowest_group_critic_included() -> None:
    cost = [4.0, 1.0, 1.0, 1.0, 1.0, 4.0]
    assert _partition(cost, 3, lambda k, i: 0.0) == [0, 4]
    # A critic after unit 0 costs 6: one that stands later is better, though the layers balance worse.
    assert _partition(cost, 2, lambda k, i: 6.0 if i == 2 else 0.0) in ([1], [3])
    # Against every split there is.
    torch.manual_seed(0)
    for _ in range(20):
        cost = torch.rand(6).tolist()
        head = torch.rand(2, 6).tolist()
        cuts = _partition(cost, 3, lambda k, i, head=head: head[k][i])  # type: ignore[misc]

        def slowest(a: int, b: int, cost: list[float] = cost, head: list[list[float]] = head) -> float:
            return max(
                sum(cost[: a + 1]) + head[0][a], sum(cost[a + 1 : b + 1]) + head[1][b], sum(cost[b + 1 :])
            )

        best = min(slowest(a, b) for a in range(5) for b in range(a + 1, 5))
        assert slowest(*cuts) == pytest.approx(best)


def test_balance_follows_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_parameters(module: nn.Module, x: Tensor, repeats: int) -> tuple[float, Tensor]:
        seconds = (
            0.0
            if isinstance(module, lct.critics.Critic)
            else float(sum(p.numel() for p in module.parameters()))
        )
        return seconds, module(x).detach()

    monkeypatch.setattr(sys.modules["lct_fast.engine.network.split"], "_time", by_parameters)
    model = nn.Sequential(*(Block(8) for _ in range(8)), nn.Flatten(), nn.Linear(8 * 64, 1))
    groups = lct.split(model, 4, torch.randn(8, 8, 8, 8))
    assert [g.units[0] for g in groups] == ["0", "2", "4", "6"]


@pytest.mark.parametrize("exit", [1, 2, 3])
def test_exits_are_plain_modules_with_the_users_names(exit: int) -> None:
    model = UserNet().eval()
    groups = lct.split(model, example_input=X, split_points=["layer1", "layer2"])
    module = exit_module(groups, exit)
    h = X
    for group in groups[:exit]:
        h = group.layers(h)
    torch.testing.assert_close(module(X), groups[exit - 1].critic(h), rtol=0, atol=0)
    names = {n for n in module.state_dict() if not n.startswith("critic.")}
    assert names <= set(model.state_dict())
    assert module is model if exit == 3 else "critic.head.weight" in module.state_dict()


def test_a_critic_of_ones_own_and_one_a_cut() -> None:
    class Mean(lct.critics.Critic):
        def __init__(self, channels: int, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(channels, classes)

        def features(self, h: Tensor) -> Tensor:
            return h.mean((2, 3))

    points = ["layer1", "layer2"]
    groups = lct.split(UserNet(), example_input=X, split_points=points, critic=lambda s, c: Mean(s[0], c))
    assert [type(g.critic) for g in groups[:2]] == [Mean, Mean]
    groups = lct.split(
        UserNet(), example_input=X, split_points=points, critic=["linear", "pooled_linear:pool=4"]
    )
    assert [g.critic.head.in_features for g in groups[:2]] == [8 * 64, 8 * 16]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def test_tied_weights_across_a_cut_are_refused_and_inside_a_group_are_not() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match="'a.weight' of group 1 is tied to .* of group 2"):
        lct.split(Tied(), example_input=x, critic="linear", split_points=["b"])
    tied = nn.Sequential(Tied(), nn.Linear(6, 3))
    assert len(lct.split(tied, example_input=x, critic="linear", split_points=["1"])) == 2


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Skip(nn.Module):
    """Two tensors are alive between a and b: no place to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.c(a + self.b(a.relu()))


def test_refusals_say_what_to_do() -> None:
    x = torch.randn(4, 6)
    cases = [
        (lambda: lct.split(Branching(), 2, x), "cannot trace Branching.forward"),
        (lambda: lct.split(UserNet(), 9, X), "9 groups asked for, but the model has only 6 units"),
        (lambda: lct.split(UserNet(), 0, X), "groups: expected an integer >= 1, got 0"),
        (lambda: lct.split(UserNet(), 2.0, X), "groups: expected an integer >= 1, got 2.0"),  # type: ignore[arg-type]
        (lambda: lct.split(UserNet(), 2, X, critic="foo"), "unknown critic 'foo'"),
        (lambda: lct.split(UserNet(), example_input=X, split_points="layer2"), "expected a list of names"),
        (lambda: lct.split(UserNet(), 2), "needs example_input"),
        (lambda: lct.split(UserNet(), 2, torch.randn(4, 1, 8, 8)), "does not accept an input of shape"),
        (
            lambda: lct.split(UserNet(), example_input=X, split_points=["layer9"]),
            "'layer9' is not a place to cut",
        ),
        (
            lambda: lct.split(UserNet(), example_input=X, split_points=["layer2", "layer1"]),
            "in the model's order",
        ),
        (
            lambda: lct.split(UserNet(), 2, X, split_points=["layer1", "layer2"]),
            "disagrees with 2 split points",
        ),
        (
            lambda: lct.split(UserNet(), 3, X, critic=["linear", "linear", "linear"]),
            "one for each of 2 cuts, got 3",
        ),
        (
            lambda: lct.split(Skip(), example_input=x, critic="linear", split_points=["b"]),
            "'b' is not a place to cut",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
