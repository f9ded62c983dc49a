"""consensus: the loss between a group's output and the stored input of the group behind it, and that input's step.

The formula is in `lct_fast.reference.consensus`, the kernels' contract in csrc/include/lct/consensus.h. This file
holds the ops themselves: schema, checks, shapes and backends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lct_fast import _native
from lct_fast.ops import available
from lct_fast.ops.backend import Backend, Op
from lct_fast.ops.register import register
from lct_fast.reference import consensus as reference

_NATIVE_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class ConsensusAdjoint(NamedTuple):
    """What `consensus_adjoint` returns: loss float32 [N], p in x's shape and dtype."""

    loss: Tensor
    p: Tensor


class ConsensusUpdate(NamedTuple):
    """What `consensus_update` returns: lambda and kappa float32; kappa None where there is none."""

    lambda_: Tensor
    kappa: Tensor | None


def consensus_adjoint(x: Tensor, lambda_next: Tensor, kappa: Tensor | None, beta: float) -> ConsensusAdjoint:
    """Loss and terminal adjoint of a group in layer-parallel training (arXiv 2009.01462).

    loss[n] = sum over features of beta/2 |lambda_next - x|^2 - <kappa, lambda_next - x>;
    p = beta (x - lambda_next) + kappa, its gradient at x. Both are computed in fp32. They carry no gradient.

    Args:
        x: the group's output [N, ...], float32, float16 or bfloat16. May be empty.
        lambda_next: the stored input of the group behind, float32, of x's shape.
        kappa: its multipliers, float32, of x's shape; None for the penalty method.
        beta: the penalty's weight, finite, above 0.

    Returns:
        ConsensusAdjoint(loss [N] float32, p of x's shape and dtype, contiguous). Not divided by anything: the mean
        over a batch is the caller's.

    Raises:
        ValueError: shapes or devices do not fit, or beta is out of range.
        TypeError: a dtype does not fit.
        BackendError: the backend asked for cannot run here.
    """
    return ConsensusAdjoint(*_adjoint(x, lambda_next, kappa, beta))


def consensus_update(
    lambda_: Tensor, kappa: Tensor | None, p: Tensor, x_prev: Tensor, beta: float, eta: float
) -> ConsensusUpdate:
    """The step of the stored input, and then of its multipliers, after the local backward (arXiv 2009.01462).

    lambda <- lambda - eta [p + beta (lambda - x_prev) - kappa], then kappa <- kappa - beta (lambda - x_prev) with the
    new lambda. Computed in fp32, into new tensors, which carry no gradient.

    Args:
        lambda_: the stored input of a group [N, ...], float32. May be empty.
        kappa: its multipliers, float32, of lambda's shape; None for the penalty method.
        p: the adjoint at lambda, of its own sample's loss and not of a batch's mean; float32, float16 or bfloat16.
        x_prev: the output of the group before, p's dtype.
        beta: the penalty's weight, finite, above 0.
        eta: the step, finite, above 0. Stable below 2 / (beta (1 + |J|^2)), J the derivative of the group behind.

    Returns:
        ConsensusUpdate(lambda, kappa or None), contiguous.

    Raises:
        ValueError, TypeError, BackendError: as `consensus_adjoint`.
    """
    following, multipliers = _update(lambda_, kappa, p, x_prev, beta, eta)
    return ConsensusUpdate(following, None if kappa is None else multipliers)


def _check_number(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive number, got {value}")


def _check(stored: dict[str, Tensor | None], computed: dict[str, Tensor]) -> None:
    """All of one shape and device; what is stored in float32, what layers gave in one dtype."""
    like_name, like = next(iter(computed.items()))
    for name, x in computed.items():
        if x.dtype not in _NATIVE_DTYPE:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}; cast it")
        if x.dtype != like.dtype:
            raise TypeError(f"{name} must be {like.dtype} as {like_name} is, got {x.dtype}; cast one of them")
    given = {name: x for name, x in stored.items() if x is not None}
    for name, x in given.items():
        if x.dtype != torch.float32:
            raise TypeError(
                f"{name} must be float32, which small steps need, got {x.dtype}; keep it in float32"
            )
    for name, x in (computed | given).items():
        if x.shape != like.shape:
            raise ValueError(f"{name} must be {list(like.shape)} as {like_name} is, got {list(x.shape)}")
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device} and {like_name} on {like.device}; move it with .to()")


def _check_adjoint(x: Tensor, lambda_next: Tensor, kappa: Tensor | None, beta: float) -> None:
    if x.dim() == 0:
        raise ValueError("x must be [N, ...], a row a sample, got a tensor without dimensions")
    _check({"lambda_next": lambda_next, "kappa": kappa}, {"x": x})
    _check_number("beta", beta)


def _check_update(
    lambda_: Tensor, kappa: Tensor | None, p: Tensor, x_prev: Tensor, beta: float, eta: float
) -> None:
    _check({"lambda": lambda_, "kappa": kappa}, {"p": p, "x_prev": x_prev})
    _check_number("beta", beta)
    _check_number("eta", eta)


def _plain(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().contiguous()


def _run_adjoint(x: Tensor, lambda_next: Tensor, kappa: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    _check_adjoint(x, lambda_next, kappa, beta)
    run: Callable[..., tuple[Tensor, Tensor]] = _ADJOINT.resolve(x.device.type, x.dtype)
    if x.numel() == 0:
        return x.new_zeros(len(x), dtype=torch.float32), torch.empty_like(
            x, memory_format=torch.contiguous_format
        )
    shape = (len(x), -1)
    rows = None if kappa is None else kappa.detach().reshape(shape)
    loss, p = run(x.detach().reshape(shape), lambda_next.detach().reshape(shape), rows, beta)
    return loss, p.view(x.shape)


def _run_update(
    lambda_: Tensor, kappa: Tensor | None, p: Tensor, x_prev: Tensor, beta: float, eta: float
) -> tuple[Tensor, Tensor]:
    _check_update(lambda_, kappa, p, x_prev, beta, eta)
    run: Callable[..., tuple[Tensor, Tensor | None]] = _UPDATE.resolve(p.device.type, p.dtype)
    if p.numel() == 0:
        return _fake_update(lambda_, kappa, p, x_prev, beta, eta)
    following, multipliers = run(_plain(lambda_), _plain(kappa), _plain(p), _plain(x_prev), beta, eta)
    return following, lambda_.new_empty(0) if multipliers is None else multipliers


def _fake_adjoint(x: Tensor, lambda_next: Tensor, kappa: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    _check_adjoint(x, lambda_next, kappa, beta)
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape)


def _fake_update(
    lambda_: Tensor, kappa: Tensor | None, p: Tensor, x_prev: Tensor, beta: float, eta: float
) -> tuple[Tensor, Tensor]:
    _check_update(lambda_, kappa, p, x_prev, beta, eta)
    return lambda_.new_empty(lambda_.shape), lambda_.new_empty(0 if kappa is None else lambda_.shape)


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.set_materialize_grads(False)
    ctx.inputs = len(inputs)


def _backward(ctx: Any, *_: Any) -> tuple[None, ...]:
    return (None,) * ctx.inputs


def _native_adjoint(
    x: Tensor, lambda_next: Tensor, kappa: Tensor | None, beta: float
) -> tuple[Tensor, Tensor]:
    native: Any = _native.load()
    x, lambda_next, kappa = x.contiguous(), lambda_next.contiguous(), _plain(kappa)
    loss, p = x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape)
    call = native.consensus_adjoint_cuda if x.is_cuda else native.consensus_adjoint_cpu
    call(
        x.data_ptr(),
        lambda_next.data_ptr(),
        _address(kappa),
        loss.data_ptr(),
        p.data_ptr(),
        *x.shape,
        beta,
        _NATIVE_DTYPE[x.dtype],
        *_where(x),
    )
    return loss, p


def _native_update(
    lambda_: Tensor, kappa: Tensor | None, p: Tensor, x_prev: Tensor, beta: float, eta: float
) -> tuple[Tensor, Tensor | None]:
    native: Any = _native.load()
    following = lambda_.new_empty(lambda_.shape)
    multipliers = None if kappa is None else lambda_.new_empty(lambda_.shape)
    call = native.consensus_update_cuda if p.is_cuda else native.consensus_update_cpu
    call(
        lambda_.data_ptr(),
        _address(kappa),
        p.data_ptr(),
        x_prev.data_ptr(),
        following.data_ptr(),
        _address(multipliers),
        p.numel(),
        beta,
        eta,
        _NATIVE_DTYPE[p.dtype],
        *_where(p),
    )
    return following, multipliers


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _where(x: Tensor) -> tuple[int, ...]:
    """Device and stream, or the number of threads."""
    if not x.is_cuda:
        return (torch.get_num_threads(),)
    index = x.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda",)}

_ADJOINT = Op(
    "consensus_adjoint",
    {
        "reference": Backend(reference.consensus_adjoint, available.always),
        "cpu": Backend(_native_adjoint, available.cpu),
        "cuda": Backend(_native_adjoint, available.cuda),
    },
    _PREFERENCE,
)
_UPDATE = Op(
    "consensus_update",
    {
        "reference": Backend(reference.consensus_update, available.always),
        "cpu": Backend(_native_update, available.cpu),
        "cuda": Backend(_native_update, available.cuda),
    },
    _PREFERENCE,
)

_adjoint = register(
    "consensus_adjoint(Tensor x, Tensor lambda_next, Tensor? kappa, float beta) -> (Tensor, Tensor)",
    _run_adjoint,
    _fake_adjoint,
    _no_gradient,
    _backward,
)
_update = register(
    "consensus_update(Tensor lambda_, Tensor? kappa, Tensor p, Tensor x_prev, float beta, float eta) "
    "-> (Tensor, Tensor)",
    _run_update,
    _fake_update,
    _no_gradient,
    _backward,
)
