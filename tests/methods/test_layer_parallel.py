"""LayerParallel's steps against autograd of its loss, and what it refuses."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.engine.network.group import OutputHead
from lct_fast.methods import Objective, SampleState

KINDS = ("penalty", "augmented_lagrangian")
ROWS = 6


@dataclass
class Setting:
    """A group, its stored inputs, and the stored inputs of the group behind it."""

    layers: nn.Module
    entry: Tensor
    kept: SampleState


def setting(kind: str, known: bool = True) -> Setting:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
    tensors = {"lambda": torch.randn(ROWS, 7)}
    if kind != "penalty":
        tensors["kappa"] = torch.randn(ROWS, 7)
    if not known:
        tensors = {n: torch.zeros_like(t) for n, t in tensors.items()}
    return Setting(layers, torch.randn(ROWS, 5), SampleState(torch.full((ROWS,), known), tensors))


def group(layers: nn.Module, critic: nn.Module | None = None) -> SimpleNamespace:
    return SimpleNamespace(layers=layers, critic=critic, fused=None, last=critic is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_relaxed_loss(kind: str) -> None:
    method, s = lct.LayerParallel(kind, beta=0.3), setting(kind)
    target, scale = torch.zeros(ROWS, dtype=torch.int64), torch.tensor(1 / ROWS)
    result = method.sample_step(group(s.layers), s.entry, target, Objective(), scale, s.kept, answers=True)
    got = [p.grad.clone() for p in s.layers.parameters()]
    s.layers.zero_grad()

    entry = s.entry.clone().requires_grad_()
    d = s.kept.tensors["lambda"] - s.layers(entry)
    each = (0.15 * d.square()).sum(1)
    if kind != "penalty":
        each = each - (s.kept.tensors["kappa"] * d).sum(1)
    each.mean().backward(retain_graph=True)
    for a, p in zip(got, s.layers.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)
    torch.testing.assert_close(result.loss, each.detach())
    # lambda is pulled by its own sample's loss, not by a mean.
    assert entry.grad is not None and result.back is not None
    torch.testing.assert_close(result.back, entry.grad * ROWS)
    # What travels forward is the stored input, not the output.
    assert torch.equal(result.h, s.kept.tensors["lambda"])


def test_the_last_group_learns_from_the_output_and_answers_with_its_adjoint() -> None:
    method = lct.LayerParallel()
    torch.manual_seed(1)
    head = OutputHead(nn.Linear(5, 3))
    layers = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    entry, target = torch.randn(ROWS, 5), torch.tensor([0, 1, 2, 0, -100, 1])
    objective = Objective()
    scale = objective.scale(target)
    result = method.sample_step(group(layers, head), entry, target, objective, scale, None, answers=True)
    leaf = entry.clone().requires_grad_()
    loss = nn.functional.cross_entropy(head(layers(leaf)), target, reduction="none")
    loss.sum().backward()
    assert leaf.grad is not None and result.back is not None and result.slot is None
    torch.testing.assert_close(result.back, leaf.grad)
    assert not result.back[4].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_sample_starts_from_a_forward_pass(kind: str) -> None:
    method, s = lct.LayerParallel(kind, beta=0.3), setting(kind, known=False)
    s.kept.known[2] = True
    s.kept.tensors["lambda"][2] = 1.0
    target, scale = torch.zeros(ROWS, dtype=torch.int64), torch.tensor(1 / ROWS)
    result = method.sample_step(group(s.layers), s.entry, target, Objective(), scale, s.kept, answers=False)
    x = s.layers(s.entry).detach()
    x[2] = 1.0
    assert torch.equal(result.h, x)
    assert result.loss.count_nonzero() == 1 and result.loss[2] > 0
    assert result.back is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_steps_with_the_answer(kind: str) -> None:
    method, s = lct.LayerParallel(kind, beta=0.3, eta=0.5), setting(kind)
    target, scale = torch.zeros(ROWS, dtype=torch.int64), torch.tensor(1 / ROWS)
    result = method.sample_step(group(s.layers), s.entry, target, Objective(), scale, s.kept, answers=True)
    assert result.slot is not None
    back, x = torch.randn(ROWS, 7), s.layers(s.entry).detach()
    found = method.late_state(result.slot, back)
    lambda_, kappa = s.kept.tensors["lambda"], s.kept.tensors.get("kappa", torch.zeros(ROWS, 7))
    expected = lambda_ - 0.5 * (back + 0.3 * (lambda_ - x) - kappa)
    torch.testing.assert_close(found["lambda"], expected)
    if kind == "penalty":
        assert list(found) == ["lambda"]
    else:
        torch.testing.assert_close(found["kappa"], kappa - 0.3 * (expected - x))


def test_defaults() -> None:
    method = lct.LayerParallel()
    assert (method.name, method.beta, method.eta) == ("penalty", 0.01, pytest.approx(20.0))
    assert method.sample_state == ("lambda",)
    other = lct.LayerParallel("augmented_lagrangian", beta=0.1)
    assert (other.name, other.eta) == ("augmented-lagrangian", pytest.approx(2.0))
    assert other.sample_state == ("lambda", "kappa")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "lagrangian"}, "kind: expected penalty or augmented_lagrangian, got 'lagrangian'"),
        ({"beta": 0.0}, "beta: expected a positive number, got 0.0"),
        ({"beta": float("nan")}, "beta: expected a positive number, got nan"),
        ({"eta": -1.0}, "eta: expected a positive number, got -1.0"),
        ({"beta": 0.5, "eta": 4.0}, r"eta \* beta = 2: penalty diverges from 2 on.*use eta <= 0.4"),
        (
            {"kind": "augmented_lagrangian", "beta": 1.0, "eta": 1.4},
            "augmented-lagrangian diverges from 1.33",
        ),
    ],
)
def test_what_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lct.LayerParallel(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "limit"), [("penalty", 2.0), ("augmented_lagrangian", 4 / 3)])
def test_the_limit_is_where_steps_with_a_fixed_adjoint_diverge(kind: str, limit: float) -> None:
    for factor, grows in ((0.98, False), (1.02, True)):
        x, p, eta = torch.zeros(1, 1), torch.ones(1, 1), factor * limit
        state = {"lambda": torch.ones(1, 1), "kappa": None if kind == "penalty" else torch.zeros(1, 1)}
        for _ in range(2000):
            state["lambda"], state["kappa"] = lct.ops.consensus_update(
                state["lambda"], state["kappa"], p, x, 1.0, eta
            )
        assert (not float(state["lambda"].abs()) < 100) == grows
