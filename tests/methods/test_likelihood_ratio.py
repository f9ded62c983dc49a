"""Likelihood-ratio gradients: those of back-propagation on average, for every kind of layer and noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lct_fast as lct
from lct_fast.engine.network.group import OutputHead
from lct_fast.methods import Objective
from lct_fast.methods.likelihood_ratio_noise import EvenNoise, RandomNoise
from lct_fast.methods.likelihood_ratio_sites import LogitSite, parametric
from lct_fast.methods.likelihood_ratio_storage import Signs, keep

OBJECTIVE = Objective()
CLASSES = 3


@pytest.fixture(autouse=True)
def _seeded(threads: None) -> None:
    torch.manual_seed(0)


class LastStep(nn.Module):
    """The output of a recurrent layer at its last step."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(2, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x)[0][:, -1]
        return out


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)), (4,)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(8, CLASSES)),
        (1, 4, 4),
    ),
    "norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES)),
        (4,),
    ),
    "rnn": (lambda: nn.Sequential(LastStep(nn.RNN), nn.Linear(4, CLASSES)), (3, 2)),
    "lstm": (lambda: nn.Sequential(LastStep(nn.LSTM), nn.Linear(4, CLASSES)), (3, 2)),
    "gru": (lambda: nn.Sequential(LastStep(nn.GRU), nn.Linear(4, CLASSES)), (3, 2)),
}


class Alone:
    """A group that is a whole network, with a loss behind it."""

    fused = None

    def __init__(
        self, layers: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] | None = None, last: bool = False
    ) -> None:
        self.layers, self.last, self.critic = layers, last, OutputHead(None)
        self.behind = loss or OBJECTIVE.per_sample


def made(net: str, rows: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = NETS[net]
    return build(), torch.randn(rows, *shape), torch.randint(0, CLASSES, (rows,))


def gradient(layers: nn.Module) -> Tensor:
    """All gradients in one vector, taken away."""
    found = torch.cat([p.grad.flatten() for p in layers.parameters() if p.grad is not None])
    layers.zero_grad()
    return found


def exact(layers: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    scale = OBJECTIVE.scale(target)
    (OBJECTIVE.per_sample(layers(x), target).sum() * scale).backward()
    return gradient(layers)


def estimate(layers: nn.Module, x: Tensor, target: Tensor, noise: str, **options: Any) -> Tensor:
    method = lct.LikelihoodRatio(noise, **options)
    group: Any = Alone(layers)
    step = method.local_step(group, x, target, OBJECTIVE, OBJECTIVE.scale(target))
    with torch.no_grad():
        torch.testing.assert_close(step.loss, OBJECTIVE.per_sample(layers(x), target))
    return gradient(layers)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, 0))


@pytest.mark.parametrize(
    ("net", "noise", "copies"),
    [
        ("mlp", "boundary", 2000),
        ("conv", "boundary", 2000),
        ("rnn", "boundary", 2000),
        *((net, "logits", 6000) for net in NETS),
        ("mlp", "weights", 8000),
        ("conv", "weights", 8000),
        ("conv", "hybrid", 8000),
    ],
)
def test_gradients_are_those_of_backpropagation_on_average(net: str, noise: str, copies: int) -> None:
    layers, x, target = made(net)
    wanted = exact(layers, x, target)
    got = estimate(layers, x, target, noise, copies=copies, sigma=0.05 if noise == "boundary" else 0.1)
    assert cosine(got, wanted) > 0.97
    assert abs(float(got.norm() / wanted.norm()) - 1) < 0.15


@pytest.mark.parametrize(
    "options",
    [
        {"one_at_a_time": False},
        {"antithetic": False, "copies": 12000},
        {"sampling": "sobol", "copies": 1024},
        {"sampling": "halton", "copies": 1024},
        {"rows": 37},
        {"learn_sigma": False, "baseline": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("noise", ["boundary", "logits"])
def test_every_way_to_draw_noise_gives_the_same_gradient(noise: str, options: dict[str, Any]) -> None:
    layers, x, target = made("mlp")
    wanted = exact(layers, x, target)
    got = estimate(layers, x, target, noise, **({"copies": 4000, "sigma": 0.1} | options))
    assert cosine(got, wanted) > 0.96


def test_ignored_rows_change_nothing() -> None:
    layers, x, target = made("mlp", rows=8)
    target[3:] = OBJECTIVE.ignore_index
    wanted = exact(layers, x, target)
    for noise in ("boundary", "logits"):
        got = estimate(layers, x, target, noise, copies=4000, sigma=0.1)
        assert cosine(got, wanted) > 0.96 and abs(float(got.norm() / wanted.norm()) - 1) < 0.15


def test_antithetic_pairs_make_the_baseline_superfluous() -> None:
    layers, x, target = made("mlp")
    found = []
    for baseline in (True, False):
        torch.manual_seed(3)
        found.append(estimate(layers, x, target, "logits", copies=4, sigma=0.1, baseline=baseline))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def spread(draws: int, **options: Any) -> float:
    """Variance of an estimate, summed over the parameters."""
    layers, x, target = made("mlp", rows=2)
    found = [estimate(layers, x, target, "boundary", sigma=0.1, **options) for _ in range(draws)]
    return float(torch.stack(found).var(0).sum())


@pytest.mark.slow
def test_pairs_baseline_and_even_points_lower_the_variance() -> None:
    plain = spread(200, copies=16, antithetic=False, baseline=False)
    with_baseline = spread(200, copies=16, antithetic=False)
    pairs = spread(200, copies=16)
    assert with_baseline < plain / 10
    assert pairs < plain / 10
    many = spread(100, copies=256)
    for sampling in ("sobol", "halton"):
        assert spread(100, copies=256, sampling=sampling) < 0.5 * many


def test_a_learned_scale_follows_the_smoothed_loss() -> None:
    """E |z + sigma eps|^2 / 2 grows by sigma^2 D for a unit of log sigma."""
    layers = nn.Sequential(nn.Linear(4, 6))
    method = lct.LikelihoodRatio("boundary", copies=20000, sigma=0.5, learn_sigma=True)
    method.prepare(layers, None)
    group: Any = Alone(layers, lambda h, target: h.square().sum(1) / 2)
    x, target = torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)
    method.local_step(group, x, target, OBJECTIVE, OBJECTIVE.scale(target))
    grown = layers.get_parameter("log_sigma").grad
    assert grown is not None and grown.shape == (1,)
    assert abs(float(grown) / (0.25 * 6) - 1) < 0.15
    # The scale is the one given times the exponential.
    layers.get_parameter("log_sigma").data.fill_(2.0)
    assert float(method._sigma(layers, 0, "boundary", x.device)) == pytest.approx(0.5 * 7.389, rel=1e-3)


@pytest.mark.parametrize("noise", ["logits", "weights"])
def test_a_layer_that_is_used_twice_is_refused(noise: str) -> None:
    shared = nn.Linear(CLASSES, CLASSES)
    group: Any = Alone(nn.Sequential(shared, nn.Tanh(), shared))
    x, target = torch.randn(4, CLASSES), torch.randint(0, CLASSES, (4,))
    with pytest.raises(ValueError, match="a Linear is used again: use noise='boundary'"):
        lct.LikelihoodRatio(noise, copies=2).local_step(group, x, target, OBJECTIVE, OBJECTIVE.scale(target))


@pytest.mark.parametrize("noise", ["logits", "weights", "hybrid"])
def test_learned_scales_of_layers(noise: str) -> None:
    layers, x, target = made("conv")
    method = lct.LikelihoodRatio(noise, copies=64, learn_sigma=True)
    method.prepare(layers, None)
    group: Any = Alone(layers)
    method.local_step(group, x, target, OBJECTIVE, OBJECTIVE.scale(target))
    grown = layers.get_parameter("log_sigma").grad
    assert grown is not None and grown.shape == (2,) and bool((grown != 0).all())


def test_a_loss_without_derivative() -> None:
    """Correct or not, behind a threshold: the estimate raises the probability of the right answer."""
    layers = nn.Linear(4, 2)
    x, target = torch.randn(64, 4), None
    target = (x[:, 0] > 0).long()

    def wrong(h: Tensor, target: Tensor) -> Tensor:
        return (h.argmax(1) != target).float()

    method = lct.LikelihoodRatio("logits", copies=32, sigma=0.5)
    group: Any = Alone(layers, wrong)
    before = float(wrong(layers(x), target).mean())
    for _ in range(60):
        method.local_step(group, x, target, OBJECTIVE, OBJECTIVE.scale(target))
        with torch.no_grad():
            for p in layers.parameters():
                assert p.grad is not None
                p -= p.grad
        layers.zero_grad()
    after = float(wrong(layers(x), target).mean())
    assert before > 0.2 and after < 0.08


def test_frozen_batch_norm_learns_scale_and_shift() -> None:
    """A site by itself: dgamma is the mean of L eps xhat / sigma, here against autograd."""
    layer = nn.BatchNorm2d(3).eval()
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    x, copies = torch.randn(6, 3, 2, 2), 4000
    weights = torch.randn(3, 2, 2)
    (layer(x).tanh() * weights).sum((1, 2, 3)).mean().backward()
    wanted = gradient(layer)
    site = LogitSite(layer, 0, RandomNoise(5, 0, True), torch.tensor(0.1), copies, same_input=True)
    with torch.no_grad():
        y = site.output((x.repeat(copies, 1, 1, 1),))
        loss = (y.tanh() * weights).sum((1, 2, 3))
        site.learn(loss, len(loss))
    assert cosine(gradient(layer), wanted) > 0.98


def test_inputs_kept_as_signs() -> None:
    x = torch.randn(7, 5, 3).relu()
    kept = Signs.of(x)
    back = kept.values()
    assert back.shape == x.shape and bool(((back > 0) == (x > 0)).all()) and bool((back[x == 0] == 0).all())
    torch.testing.assert_close(back.sum((1, 2)), x.sum((1, 2)))
    both = Signs.of(x - 0.5).values()
    torch.testing.assert_close(both.sum((1, 2)), (x - 0.5).sum((1, 2)))
    large = torch.randn(64, 1024)
    assert keep(large, "full").nbytes == 64 * 4096
    assert keep(large, "sign").nbytes == 64 * (128 + 8)


@pytest.mark.parametrize("one_at_a_time", [True, False])
def test_signs_take_little_memory_and_point_the_same_way(one_at_a_time: bool) -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    x, target = torch.randn(16, 64), torch.randint(0, CLASSES, (16,))
    found = {}
    for storage in ("full", "sign"):
        torch.manual_seed(2)
        method = lct.LikelihoodRatio("logits", copies=32, storage=storage, one_at_a_time=one_at_a_time)
        group: Any = Alone(layers)
        method.local_step(group, x, target, OBJECTIVE, OBJECTIVE.scale(target))
        found[storage] = gradient(layers)
        inputs = 16 * 64 * 4 * (1 if one_at_a_time else 2 * 32)
        assert method.full_bytes == inputs
        assert method.kept_bytes == (inputs if storage == "full" else inputs // 32 + inputs // 256 * 8)
    assert cosine(found["sign"], found["full"]) > 0.7


def test_noise_is_the_same_each_time_it_is_asked() -> None:
    shape, one = torch.Size((8, 3)), torch.ones(())
    for noise in (
        RandomNoise(3, 0, True),
        EvenNoise("sobol", 3, 0, 4, True),
        EvenNoise("halton", 3, 5, 4, True),
    ):
        eps = noise.add(torch.zeros(2, 3), one, 4)
        assert torch.equal(noise.error(torch.ones(8), one, shape, 1), eps)
        assert torch.equal(eps[4:], -eps[:4])


def test_even_points_are_normal_and_even() -> None:
    """One dimension: 64 points leave no gap of more than 2 / 64, whatever the shift."""
    for kind in ("sobol", "halton"):
        noise = EvenNoise(kind, 1, 0, 64, False)
        eps = noise.add(torch.zeros(50, 1), torch.ones(()), 64).view(64, 50)
        u = torch.special.ndtr(eps).sort(0).values
        gaps = u[1:] - u[:-1]
        assert float(gaps.max()) < 2.1 / 64
        # Two chunks are the points of one.
        halves = [EvenNoise(kind, 1, first, 32, False) for first in (0, 32)]
        parts = [half.add(torch.zeros(50, 1), torch.ones(()), 32) for half in halves]
        assert torch.equal(torch.cat(parts).view(64, 50), eps)
    with pytest.raises(ValueError, match="at most 21201 values a sample"):
        EvenNoise("sobol", 0, 0, 2, True).add(torch.zeros(2, 30000), torch.ones(()), 2)


def test_bad_options_are_refused() -> None:
    for options, message in [
        (
            {"noise": "everywhere"},
            "noise: expected one of boundary, logits, weights, hybrid; got 'everywhere'",
        ),
        ({"sampling": "grid"}, "sampling: expected one of random, sobol, halton"),
        ({"storage": "none"}, "storage: expected one of full, sign"),
        ({"copies": 3}, "copies: expected an even number >= 2, as antithetic noise comes in pairs, got 3"),
        ({"copies": 0, "antithetic": False}, "copies: expected a number >= 1, got 0"),
        ({"sigma": 0.0}, "sigma: expected a positive number, got 0.0"),
        ({"rows": 0}, "rows: expected a number >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            lct.LikelihoodRatio(**options)  # type: ignore[arg-type]


def test_layers_that_cannot_learn_are_named() -> None:
    method = lct.LikelihoodRatio("logits")
    with pytest.raises(ValueError, match="does not work through batch norm, got 1: use a model without it"):
        method.prepare(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), None)
    with pytest.raises(ValueError, match=r"no likelihood-ratio gradient for 0 \(Bilinear\)"):
        method.prepare(nn.Sequential(nn.Bilinear(2, 2, 2)), None)
    with pytest.raises(ValueError, match=r"\(LSTM\): expected .* one-layer RNN"):
        parametric(nn.LSTM(2, 2, 2))
    lct.LikelihoodRatio("boundary").prepare(nn.Sequential(nn.Bilinear(2, 2, 2)), None)


def _first_gate(layer: Any, x: Tensor, h: Tensor) -> Tensor:
    both = x @ layer.weight_ih_l0.t() + h @ layer.weight_hh_l0.t()
    both = both + layer.bias_ih_l0 + layer.bias_hh_l0 if layer.bias else both
    first: Tensor = both[:, :5]
    return first


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_unrolled_cells_are_torchs(kind: type[nn.RNNBase], batch_first: bool, bias: bool) -> None:
    from lct_fast.methods.likelihood_ratio_recurrent import pre_activations, unroll

    layer = kind(3, 5, batch_first=batch_first, bias=bias)  # type: ignore[call-arg]
    x = torch.randn(4, 6, 3)
    state: Any = torch.randn(1, 4 if batch_first else 6, 5)
    state = (state, torch.randn_like(state)) if kind is nn.LSTM else state
    for inputs in ((x,), (x, state)):
        (out, last), run = unroll(layer, inputs, lambda z: z)
        expected, expected_last = layer(*inputs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(last, expected_last)
        # Every step again from the state before it alone.
        gates = pre_activations(layer, run)
        assert gates.shape == run.shape
        steps = out if batch_first else out.transpose(0, 1)
        if kind is nn.RNN:
            torch.testing.assert_close(gates.tanh(), steps)
        if kind is nn.GRU:
            reset, update, new = gates.chunk(3, -1)
            assert run.reset is not None
            torch.testing.assert_close(reset.sigmoid(), run.reset)
            mixed = new.tanh() + update.sigmoid() * (run.h - new.tanh())
            torch.testing.assert_close(mixed, steps)
        if kind is nn.LSTM:
            torch.testing.assert_close(gates[:, 0, :5], _first_gate(layer, run.x[:, 0], run.h[:, 0]))
