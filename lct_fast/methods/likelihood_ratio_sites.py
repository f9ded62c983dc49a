"""Places inside a network that take noise, one layer each, and how its parameters learn from the loss.

A site stands in for its layer while noisy copies pass, and afterwards turns their losses into the layer's gradient. It
sees that one layer only: gradients are ``autograd.grad`` of the layer's own output at its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lct_fast.methods.likelihood_ratio_noise import Noise
from lct_fast.methods.likelihood_ratio_recurrent import Unrolled, pre_activations, recurrent_layer, unroll
from lct_fast.methods.likelihood_ratio_storage import Signs, Whole, keep
from lct_fast.methods.method import accumulate

# The parameter of a group that holds the scales it learns: no layer's.
LOG_SIGMA = "log_sigma"
# Layers whose output is their pre-activation. Of norms, scale and shift learn.
_SIMPLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class Site:
    """One layer under one draw of noise.

    Args:
        layer: the module.
        index: number of the layer in its group.
        noise, sigma: what it takes; sigma is 0-dim.

    Attributes:
        shape: of eps, once noisy copies have passed.
        kept, full: bytes of the input held for the gradient, and what it would have taken as it came.
    """

    def __init__(self, layer: nn.Module, index: int, noise: Noise, sigma: Tensor) -> None:
        self.layer, self.index, self.noise, self.sigma = layer, index, noise, sigma
        self.shape = torch.Size()
        self.kept = self.full = 0

    def hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """A forward hook of the layer: what it gives for noisy copies, in place of its output.

        Raises:
            ValueError: the layer has a second turn in one pass.
        """
        if self.shape:
            raise ValueError(
                f"noise goes into a layer once in a pass, but a {type(module).__name__} is used again: use "
                f"noise='boundary'"
            )
        return self.output(inputs)

    def output(self, inputs: tuple[Any, ...]) -> Any:
        raise NotImplementedError

    def row_loss(self, loss: Tensor) -> Tensor:
        """The loss of each row of eps, from that of each row of the batch."""
        return loss

    def learn(self, loss: Tensor, total: int) -> None:
        """Adds the layer's gradient; loss [copies * B], of ``total`` such rows in all chunks."""
        raise NotImplementedError


def parametric(layers: nn.Module) -> list[nn.Module]:
    """The modules with parameters of their own that learn, in the order of definition.

    Raises:
        ValueError: one for which there is no likelihood-ratio gradient, in one line.
    """
    found = []
    for name, module in layers.named_modules():
        own = module.named_parameters(recurse=False)
        if not any(p.requires_grad for key, p in own if key != LOG_SIGMA):
            continue
        if not isinstance(module, _SIMPLE) and recurrent_layer(module) is None:
            raise ValueError(
                f"no likelihood-ratio gradient for {name} ({type(module).__name__}): expected linear, convolution, "
                f"norm, or one-layer RNN (tanh), LSTM or GRU; use noise='boundary'"
            )
        found.append(module)
    return found


def refuse_batch_norm(layers: nn.Module) -> None:
    """Refuses batch norm: in training the noise in one sample's copy moves all others.

    Raises:
        ValueError: names the layer.
    """
    for name, module in layers.named_modules():
        if isinstance(module, _BatchNorm):
            raise ValueError(
                f"likelihood-ratio training does not work through batch norm, got {name}: use a model without it, as "
                f"--model digits_cnn:norm=none"
            )


class LogitSite(Site):
    """Noise on a layer's output before its activation; N is samples times copies.

    linear dW = 1/(N sigma) sum L eps x^T; convolution: torch's weight gradient with L eps / (N sigma) at the output;
    norm dgamma = 1/(N sigma) sum L eps xhat.

    Args:
        copies: in the rows that come.
        storage: how the input is kept.
        same_input: all copies come with the same input, so errors are summed over them first.
    """

    def __init__(
        self,
        layer: nn.Module,
        index: int,
        noise: Noise,
        sigma: Tensor,
        copies: int = 1,
        storage: str = "full",
        same_input: bool = False,
    ) -> None:
        super().__init__(layer, index, noise, sigma)
        self.copies, self.storage, self.same_input = copies, storage, same_input

    def output(self, inputs: tuple[Any, ...]) -> Tensor:
        x: Tensor = inputs[0]
        needed = x[: len(x) // self.copies] if self.same_input else x
        self.input: Whole | Signs = keep(needed, self.storage)
        self.kept, self.full = self.input.nbytes, needed.nbytes
        y = self.noise.add(self.layer.forward(x), self.sigma)
        self.shape = y.shape
        return y

    def learn(self, loss: Tensor, total: int) -> None:
        error = self.noise.error(loss, self.sigma, self.shape, total)
        if self.same_input:
            error = error.view(self.copies, -1, *self.shape[1:]).sum(0)
        x = self.input.values()
        _gradients(self.layer, lambda: self.layer.forward(x), error)


class WeightSite(Site):
    """Noise on a layer's parameters, one draw a copy for all of its samples.

    dW = 1/(N sigma) sum L E: L is the mean loss of a copy, N the copies.

    Args:
        copies: in the rows that come.
    """

    def __init__(self, layer: nn.Module, index: int, noise: Noise, sigma: Tensor, copies: int = 1) -> None:
        super().__init__(layer, index, noise, sigma)
        self.copies = copies
        own = layer.named_parameters(recurse=False)
        self.parameters = {name: p for name, p in own if p.requires_grad}

    def output(self, inputs: tuple[Any, ...]) -> Any:
        flat = torch.cat([p.detach().flatten() for p in self.parameters.values()])
        noisy = self.noise.add(flat[None], self.sigma, self.copies)
        self.shape = noisy.shape
        return torch.cat(
            [
                self._forward(x, self._parts(values))
                for x, values in zip(inputs[0].chunk(self.copies), noisy, strict=True)
            ]
        )

    def row_loss(self, loss: Tensor) -> Tensor:
        return loss.view(self.copies, -1).mean(1)

    def learn(self, loss: Tensor, total: int) -> None:
        copies = total * self.copies // len(loss)
        error = self.noise.error(self.row_loss(loss), self.sigma, self.shape, copies)
        for name, gradient in self._parts(error.sum(0)).items():
            accumulate(self.parameters[name], gradient)

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Values of all parameters, each in its shape."""
        pieces = flat.split([p.numel() for p in self.parameters.values()])
        return {
            name: piece.view_as(p) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)
        }

    def _forward(self, x: Tensor, values: dict[str, Tensor]) -> Any:
        """The layer's own forward, with other values for its parameters."""
        held = dict(self.layer._parameters)
        try:
            self.layer._parameters.update(values)  # type: ignore[arg-type]
            return self.layer.forward(x)
        finally:
            self.layer._parameters.update(held)


class RecurrentSite(Site):
    """Noise on every gate's pre-activation at every step of an RNN (tanh), LSTM or GRU.

    dW_hh = 1/(N sigma) sum over steps of L eps_t h_{t-1}^T, and so on: no back-propagation through time.

    Args:
        storage: how inputs and states are kept.
    """

    def __init__(
        self, layer: nn.Module, index: int, noise: Noise, sigma: Tensor, storage: str = "full"
    ) -> None:
        super().__init__(layer, index, noise, sigma)
        self.storage = storage

    def output(self, inputs: tuple[Any, ...]) -> Any:
        result, run = unroll(self.layer, inputs, lambda z: self.noise.add(z, self.sigma))
        self.shape, self.reset = run.shape, run.reset
        self.inputs, self.states = keep(run.x, self.storage), keep(run.h, self.storage)
        self.kept = self.inputs.nbytes + self.states.nbytes
        self.full = run.x.nbytes + run.h.nbytes
        return result

    def learn(self, loss: Tensor, total: int) -> None:
        error = self.noise.error(loss, self.sigma, self.shape, total)
        run = Unrolled(self.inputs.values(), self.states.values(), self.reset, self.shape)
        _gradients(self.layer, lambda: pre_activations(self.layer, run), error)


def _gradients(layer: nn.Module, output: Callable[[], Tensor], error: Tensor) -> None:
    """Adds the parameters' gradient of one layer's output, given the error there; nothing goes further back."""
    parameters = [p for p in layer.parameters(recurse=False) if p.requires_grad]
    with torch.enable_grad():
        y = output()
        found = torch.autograd.grad(y, parameters, error.to(y.dtype))
    for p, gradient in zip(parameters, found, strict=True):
        accumulate(p, gradient)
