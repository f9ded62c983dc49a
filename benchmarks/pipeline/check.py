"""What a contender of `benchmarks.pipeline` must compute on its first batch, in float64 and in plain float32."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.pipeline.local import METHODS
from benchmarks.pipeline.model import Task, in_format
from benchmarks.pipeline.rivals import Outputs, Setting, gradients

# Of a loss: the network is continuous, so that rounding in another order moves it by a few eps.
LOSS = 64 * torch.finfo(torch.float32).eps
# Of a gradient, by its norm, beside twice what plain torch is off by in the same format and microbatches. A value that
# rounding moves over a ReLU's kink switches a term of the gradient on or off: one has been seen to move a tensor by
# 1.1 %, in plain torch as in what is held against it, and not the same one in both.
GRADIENT = 0.012
# At most, with what plain torch is off by: a wrong scale, a lost microbatch or a process left out moves a tensor by 6 %
# and more.
KINK = 0.03
# By how much a codec may move what crosses the cut, by its norm: for one bit a value of random maps 0.6 was seen.
CODED = 0.8


def backprop(task: Task, microbatches: int, format: str, dtype: torch.dtype) -> Outputs:
    """Loss and gradients of plain back-propagation; batch norm sees microbatches."""
    model = in_format(task.model(), format, dtype)
    x, y = task.data(format)[0]
    total = torch.zeros((), dtype=dtype)
    for a, b in zip(x.to(dtype).chunk(microbatches), y.chunk(microbatches), strict=True):
        loss = cross_entropy(model(a), b) / microbatches
        loss.backward()
        total += loss.detach()
    return {"loss": total, **gradients(model)}


def local(task: Task, setting: Setting, dtype: torch.dtype, decoded: Tensor | None) -> Outputs:
    """The same of both groups, each by autograd from its head's cross-entropy.

    Group 2 takes group 1's output where there is a link, or what a codec ``decoded`` there, and else the first of
    ``Task.states``. "group2.input" is group 1's output.
    """
    h, y = task.data(setting.format)[0]
    out: Outputs = {}
    for k, group in enumerate(task.groups(setting.critic), 1):
        in_format(group, setting.format, dtype).train()
        after = group.layers(h.to(dtype))
        loss = cross_entropy(group.critic(after), y)
        loss.backward()
        if not group.last and not METHODS[setting.method]().joint_optimizer:
            # Such a critic learns from the next group's loss, later.
            group.critic.zero_grad()
        named = {"loss": loss.detach(), **gradients(group)}
        out |= {f"group{k}.{name}": value for name, value in named.items()}
        h = task.states(setting.format)[0] if setting.kind == "no link" else after.detach()
        if decoded is not None and not group.last:
            out["group2.input"], h = h, decoded
    return out


def accumulation(setting: Setting) -> int:
    """Into how many parts, each with a batch norm of its own, a contender divides the batch."""
    return 2 if setting.kind == "DDP" else setting.microbatches


def expected(task: Task, setting: Setting, dtype: torch.dtype, decoded: Tensor | None = None) -> Outputs:
    """What ``Contender.first`` of all processes together must be; ``decoded`` is what came out of a codec."""
    if setting.method:
        return local(task, setting, dtype, decoded)
    return backprop(task, accumulation(setting), setting.format, dtype)


class Verdict(NamedTuple):
    """The largest relative errors, and what is wrong, or None."""

    loss: float
    gradient: float
    wrong: str | None


def check(got: Outputs, plain: Outputs, exact: Outputs) -> Verdict:
    """Hold the outputs of all processes against float64; ``plain`` says how near plain float32 comes."""
    if got.keys() != exact.keys():
        missing, extra = sorted(exact.keys() - got.keys()), sorted(got.keys() - exact.keys())
        message = f"expected the outputs of plain back-propagation: missing {missing}, not expected {extra}"
        return Verdict(math.inf, math.inf, message)
    wrong: str | None = None
    largest = {"loss": 0.0, "gradient": 0.0}
    for name, value in got.items():
        error = relative_error(value, exact[name])
        kind, allowed = "loss", LOSS
        if name == "group2.input":
            if not error <= CODED:
                wrong = f"a codec moved {name} by {error:.2f} of its norm, expected at most {CODED}"
            continue
        if not name.endswith("loss"):
            kind, allowed = "gradient", min(2 * relative_error(plain[name], exact[name]) + GRADIENT, KINK)
        largest[kind] = max(largest[kind], error)
        # NaN is wrong too.
        if not error <= allowed:
            wrong = f"{name} is off by {error:.1e} of float64's norm, expected at most {allowed:.1e}"
    return Verdict(**largest, wrong=wrong)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact|, by the norm."""
    if got.shape != exact.shape:
        return math.inf
    return float((got.double() - exact).norm() / exact.norm())


class Judge:
    """Checks contenders; what they are held against is made once for each kind of answer."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._known: dict[tuple[object, ...], tuple[Outputs, Outputs]] = {}

    def __call__(self, setting: Setting, got: Outputs) -> Verdict:
        if setting.codec:
            decoded = got.get("group2.input")
            plain, exact = (expected(self.task, setting, t, decoded) for t in (torch.float32, torch.float64))
            return check(got, plain, exact)
        grouped = (setting.kind, setting.method, setting.critic) if setting.method else ()
        key = (*grouped, setting.format, accumulation(setting))
        if key not in self._known:
            self._known[key] = (
                expected(self.task, setting, torch.float32),
                expected(self.task, setting, torch.float64),
            )
        return check(got, *self._known[key])


def merged(parts: list[Outputs]) -> Outputs:
    """Outputs of all processes; none may appear twice."""
    out: dict[str, Tensor] = {}
    for part in parts:
        twice = out.keys() & part.keys()
        if twice:
            raise ValueError(f"two processes returned {sorted(twice)}: each output belongs to one process")
        out |= part
    return out
