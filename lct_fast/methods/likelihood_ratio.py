"""Likelihood-ratio training (ULR): arXiv 2305.08960, with signs for stored inputs as in ALR, arXiv 2403.12320."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, fx, nn

from lct_fast.methods.likelihood_ratio_noise import SAMPLING, EvenNoise, Noise, RandomNoise
from lct_fast.methods.likelihood_ratio_recurrent import recurrent_layer
from lct_fast.methods.likelihood_ratio_sites import (
    LOG_SIGMA,
    LogitSite,
    RecurrentSite,
    Site,
    WeightSite,
    parametric,
    refuse_batch_norm,
)
from lct_fast.methods.likelihood_ratio_storage import STORAGE
from lct_fast.methods.method import GroupLike, LocalStep, Method, Span, accumulate, joint_step, no_span
from lct_fast.methods.objective import Objective

NOISE = ("boundary", "logits", "weights", "hybrid")
# Scale of the noise where none is given; parameters take less than what they make. "hybrid" is that of its parameters.
SIGMA = {"boundary": 0.1, "logits": 0.1, "weights": 1e-2, "hybrid": 1e-2}
# A learned scale stays within these.
_LEAST, _MOST = 1e-4, 10.0


class LikelihoodRatio(Method):
    """Groups learn from how the network's loss answers to noise in them; no gradient crosses a cut.

    z + sigma * eps in place of z makes the mean over copies of L eps / sigma an estimate of the loss's gradient at z.
    Where the noise goes:

    - ``"boundary"``: on a group's output; the estimate is the group's upstream error and ordinary back-propagation does
      the rest inside. The last group takes its own gradient.
    - ``"logits"``: on every layer's output before its activation; all groups, the last too, run forward only.
    - ``"weights"``: on every layer's parameters, one draw a copy.
    - ``"hybrid"``: on parameters where a layer has fewer of them than outputs a sample, as early convolutions do, else
      on outputs.

    The loss and what lies behind the noise need no derivative. Batch norm that takes statistics from the batch is
    refused: it ties the samples' losses together.

    Args:
        noise: one of the above.
        copies: noisy copies of each sample, for each place; even with ``antithetic``.
        sigma: standard deviation of the noise; None for 0.1, and 0.01 on parameters.
        antithetic: copies come in pairs with opposite noise.
        one_at_a_time: layer-wise noise in one layer at a time, not in all layers of a group at once.
        sampling: "random", made again and never stored; "sobol" or "halton", spread evenly and stored.
        baseline: takes the noise-free loss off each copy's. (In antithetic pairs it cancels.)
        learn_sigma: the scale learns too, d log sigma = mean of L sum(eps^2 - 1), one for each place.
        storage: layer-wise, what is kept of a layer's input until the loss is known: "full" or "sign".
        rows: copies go through the network so many rows at a time at most.

    Attributes:
        kept_bytes, full_bytes: of layers' inputs kept for their gradients in the latest step of any group, at most at
            one time, and what they would have taken in full.

    Raises:
        ValueError: an argument out of range, in one line.
    """

    name = "likelihood-ratio"
    uses_critics = False
    asks_behind = True

    def __init__(
        self,
        noise: str = "boundary",
        copies: int = 32,
        sigma: float | None = None,
        antithetic: bool = True,
        one_at_a_time: bool = True,
        sampling: str = "random",
        baseline: bool = True,
        learn_sigma: bool = False,
        storage: str = "full",
        rows: int = 1024,
    ) -> None:
        for what, value, known in (
            ("noise", noise, NOISE),
            ("sampling", sampling, SAMPLING),
            ("storage", storage, STORAGE),
        ):
            if value not in known:
                raise ValueError(f"{what}: expected one of {', '.join(known)}; got {value!r}")
        if copies < 1 or (antithetic and copies % 2):
            kind = (
                "an even number >= 2, as antithetic noise comes in pairs" if antithetic else "a number >= 1"
            )
            raise ValueError(f"copies: expected {kind}, got {copies}")
        if sigma is not None and not 0 < sigma < math.inf:
            raise ValueError(f"sigma: expected a positive number, got {sigma}")
        if rows < 1:
            raise ValueError(f"rows: expected a number >= 1, got {rows}")
        self.noise, self.copies, self.sigma = noise, copies, sigma
        self.antithetic, self.one_at_a_time, self.sampling = antithetic, one_at_a_time, sampling
        self.baseline, self.learn_sigma, self.storage, self.rows = baseline, learn_sigma, storage, rows
        self.kept_bytes = self.full_bytes = 0

    def prepare(self, layers: nn.Module, head: nn.Module | None) -> None:
        """Refuses what cannot learn this way, and gives a group the scales that it learns.

        Args:
            layers: the group's; head: the end of the network, of the last group.
        """
        refuse_batch_norm(layers)
        if self.noise == "boundary":
            places = int(head is None)
        else:
            places = len(parametric(layers)) + (len(parametric(head)) if head is not None else 0)
        if self.learn_sigma and places:
            parts = [layers] if head is None else [layers, head]
            device = next(p.device for part in parts for p in part.parameters())
            layers.register_parameter(LOG_SIGMA, nn.Parameter(torch.zeros(places, device=device)))

    def local_step(
        self,
        group: GroupLike,
        x: Tensor,
        target: Tensor,
        objective: Objective,
        scale: Tensor,
        *,
        keep_slot: bool = False,
        span: Span = no_span,
    ) -> LocalStep:
        asking, layers = cast(_Asking, group), group.layers
        if self.noise == "boundary":
            if group.last:
                return joint_step(group, x, target, objective, scale, span=span)
            return self._boundary(asking, x, target, scale, span)
        if not isinstance(layers, nn.Module) or hasattr(layers, "_orig_mod"):
            raise ValueError(
                f"noise={self.noise!r} goes into single layers, which compiled groups do not show: use compile=False"
            )
        with torch.no_grad():
            return self._layer_wise(asking, layers, x, target, scale, span)

    def _boundary(self, group: _Asking, x: Tensor, target: Tensor, scale: Tensor, span: Span) -> LocalStep:
        with span("forward"):
            h = group.layers(x)
        layers = cast(nn.Module, group.layers)
        with torch.no_grad(), span("noisy copies"):
            clean = h.detach()
            loss = group.behind(clean, target)
            sigma, learned = self._sigma(layers, 0, "boundary", h.device), self._learned(layers)
            # The losses count as ``scale`` says, which leaves out rows without a label.
            weight, total = scale * len(x), self.copies * len(x)
            error = torch.zeros_like(clean, dtype=torch.float32)
            for copies, (noise,) in self._draws(len(x), 1):
                noisy = group.behind(noise.add(clean, sigma, copies), _repeat(target, copies))
                centred = (noisy - _repeat(loss, copies)) * weight
                gain = centred if self.baseline else noisy * weight
                shape = torch.Size((copies * len(x), *clean.shape[1:]))
                rows = noise.error(gain, sigma, shape, total)
                error += rows.view(copies, *clean.shape).sum(0)
                if learned is not None:
                    _learn_sigma(learned, 0, noise, centred, shape, total)
        with span("backward"):
            if h.requires_grad:
                h.backward(error.to(h.dtype))
        return LocalStep(clean, loss)

    def _layer_wise(
        self, group: _Asking, layers: nn.Module, x: Tensor, target: Tensor, scale: Tensor, span: Span
    ) -> LocalStep:
        units = _chain(layers)
        head = [group.critic] if group.last else []
        with span("forward"), _recording([layers, *head]) as outputs:
            entries = [x]
            for unit in units:
                entries.append(unit(entries[-1]))
            h = entries[-1]
            loss = group.behind(h, target)
        places = [
            _Place(start, layer, outputs.get(layer))
            for start, unit in enumerate([*units, *head])
            for layer in parametric(unit)
        ]
        numbers = list(range(len(places)))
        turns = [[i] for i in numbers] if self.one_at_a_time else [numbers]
        weight, total = scale * len(x), self.copies * len(x)
        self.kept_bytes = self.full_bytes = 0
        with span("noisy copies"):
            for turn in turns:
                start = min((places[i].start for i in turn), default=0)
                for copies, noises in self._draws(len(x), len(turn)):
                    sites = [
                        self._site(layers, places[i], i, noise, copies)
                        for i, noise in zip(turn, noises, strict=True)
                    ]
                    rows = _repeat(entries[start], copies)
                    noisy = _through(group, units[start:], sites, rows, _repeat(target, copies))
                    self._learn(layers, sites, noisy, _repeat(loss, copies), weight, total)
        return LocalStep(h, loss)

    def _learn(
        self, layers: nn.Module, sites: list[Site], noisy: Tensor, loss: Tensor, weight: Tensor, total: int
    ) -> None:
        """What the sites learn from the losses of noisy rows and of the same rows without noise."""
        centred = (noisy - loss) * weight
        gain = centred if self.baseline else noisy * weight
        self.kept_bytes = max(self.kept_bytes, sum(site.kept for site in sites))
        self.full_bytes = max(self.full_bytes, sum(site.full for site in sites))
        learned = self._learned(layers)
        for site in sites:
            site.learn(gain, total)
            if learned is not None:
                rows = site.row_loss(centred)
                draws = total * len(rows) // len(centred)
                _learn_sigma(learned, site.index, site.noise, rows, site.shape, draws)

    def _site(self, layers: nn.Module, place: _Place, index: int, noise: Noise, copies: int) -> Site:
        layer = place.layer
        device = next(layer.parameters()).device
        if recurrent_layer(layer) is not None and self.noise != "weights":
            return RecurrentSite(
                layer, index, noise, self._sigma(layers, index, "logits", device), self.storage
            )
        own = sum(p.numel() for p in layer.parameters(recurse=False))
        if self.noise == "weights":
            return WeightSite(layer, index, noise, self._sigma(layers, index, "weights", device), copies)
        if self.noise == "hybrid" and place.outputs is not None and own < place.outputs:
            return WeightSite(layer, index, noise, self._sigma(layers, index, "hybrid", device), copies)
        sigma = self._sigma(layers, index, "logits", device)
        return LogitSite(layer, index, noise, sigma, copies, self.storage, self.one_at_a_time)

    def _sigma(self, layers: nn.Module, index: int, kind: str, device: torch.device) -> Tensor:
        """The scale of one place, 0-dim; of a hybrid the one given is that of outputs."""
        sigma = SIGMA[kind]
        if self.sigma is not None:
            sigma = self.sigma * SIGMA["hybrid"] / SIGMA["logits"] if kind == "hybrid" else self.sigma
        learned = self._learned(layers)
        if learned is None:
            return torch.tensor(sigma, device=device)
        return (sigma * learned.detach()[index].exp()).clamp(_LEAST, _MOST)

    def _learned(self, layers: nn.Module) -> nn.Parameter | None:
        """Logarithms of what the scales of a group are multiplied by, one a place; None where they don't learn."""
        return getattr(layers, LOG_SIGMA, None) if self.learn_sigma else None

    def _draws(self, samples: int, places: int) -> Iterator[tuple[int, list[Noise]]]:
        """For each chunk of copies their number and one noise a place, of streams that nobody else has."""
        seeds = torch.randint(2**62, (places,)).tolist()
        step = 2 if self.antithetic else 1
        most = max(step, self.rows // samples // step * step)
        for first in range(0, self.copies, most):
            copies = min(most, self.copies - first)
            yield copies, [self._noise(seed, first, copies) for seed in seeds]

    def _noise(self, seed: int, first: int, copies: int) -> Noise:
        if self.sampling == "random":
            # Chunks are streams of their own.
            return RandomNoise(seed + first, 0, self.antithetic)
        point = first // 2 if self.antithetic else first
        return EvenNoise(self.sampling, seed, point, copies, self.antithetic)


class _Asking(GroupLike, Protocol):
    """A group that knows the network's loss [M] of its output h_k [M, ...], whatever stands behind it."""

    def behind(self, h: Tensor, target: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Place:
    """A layer that learns, the unit of its group in which noise on it begins, and its values a sample, if known."""

    start: int
    layer: nn.Module
    outputs: int | None


def _through(
    group: _Asking, units: list[nn.Module], sites: list[Site], rows: Tensor, target: Tensor
) -> Tensor:
    """Loss of each row that passes the units, with noise at the sites."""
    with ExitStack() as hooks:
        for site in sites:
            hooks.callback(site.layer.register_forward_hook(site.hook).remove)
        for unit in units:
            rows = unit(rows)
        return group.behind(rows, target)


def _learn_sigma(
    learned: nn.Parameter, index: int, noise: Noise, loss: Tensor, shape: torch.Size, total: int
) -> None:
    """d log sigma = mean of L sum(eps^2 - 1) over ``total`` rows; loss [M] of the rows of eps, ``shape`` [M, ...]."""
    one = torch.ones((), device=loss.device)
    eps = noise.error(torch.ones_like(loss), one, shape, 1)
    gradient = torch.zeros_like(learned)
    gradient[index] = (loss * (eps.square() - 1).flatten(1).sum(1)).sum() / total
    accumulate(learned, gradient)


def _repeat(x: Tensor, copies: int) -> Tensor:
    """x [B, ...] -> [copies * B, ...], copy by copy."""
    return x.repeat(copies, *(1 for _ in x.shape[1:]))


def _chain(layers: nn.Module) -> list[nn.Module]:
    """The units of a group one behind the other, so that noise in one begins there; the group whole if it branches."""
    if not isinstance(layers, fx.GraphModule):
        return [layers]
    nodes = [n for n in layers.graph.nodes if n.op not in ("placeholder", "output")]
    before = next(n for n in layers.graph.nodes if n.op == "placeholder")
    units = []
    for node in nodes:
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return [layers]
        units.append(layers.get_submodule(str(node.target)))
        before = node
    return units


@contextmanager
def _recording(parts: list[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """Notes how many values a sample each layer with parameters gives."""
    sizes: dict[nn.Module, int] = {}

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes[module] = output[0].numel()

    with ExitStack() as hooks:
        for layer in (layer for part in parts for layer in parametric(part)):
            hooks.callback(layer.register_forward_hook(note).remove)
        yield sizes
