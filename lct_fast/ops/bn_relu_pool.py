"""bn_relu_pool: the end of a convolutional group, batch norm, ReLU and the average pool that its critic reads.

The formula is in `lct_fast.reference.bn_relu_pool`, the kernels' contract in csrc/include/lct/bn_relu_pool.h.
This file holds the op itself: schema, checks, shapes, autograd formula and backends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lct_fast import _native
from lct_fast.ops import available
from lct_fast.ops.backend import Backend, Op
from lct_fast.ops.register import register
from lct_fast.reference import bn_relu_pool as reference

_NATIVE_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FLOATS = (*_NATIVE_DTYPE, torch.float64)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class BnReluPool(NamedTuple):
    """What `bn_relu_pool` returns; mean and var (biased) are those that x was normalised with, [C]."""

    y: Tensor
    pooled: Tensor
    mean: Tensor
    var: Tensor


def bn_relu_pool(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool: int = 1,
    reuse_input: bool = False,
) -> BnReluPool:
    """y = relu(batch_norm(x)) and the average of y over pool x pool windows, sharing passes over x.

    In training mode, or without running statistics, x is normalised with the mean and the biased variance of
    the batch, else with the running ones. In training mode the running ones are then updated in place, as
    torch.nn.BatchNorm2d does: running += momentum * (batch - running), with the unbiased variance.

    Differentiable (once) in x, gamma and beta through y, pooled or both. A gradient that comes through pooled
    alone is never spread over the map, and its backward reads x once. Sums are fp32 or better and give the
    same bits on every run.

    x may be contiguous or channels_last in memory; y and dx come in the same format. Any other layout is
    copied first, as is a dy in another format than x's. pooled is contiguous. A NaN or Inf makes NaN of its
    channel's mean, variance and output. An empty batch leaves the running statistics alone.

    Args:
        x: [N, C, H, W] float32, float16 or bfloat16 (float64 on backend `reference`). N may be 0.
        gamma, beta: [C], any of those dtypes, scale and shift.
        running_mean, running_var: [C] or None and None.
        training: whether batch statistics are used and the running ones updated.
        momentum: share of the batch in the new running statistics.
        eps: added to the variance.
        pool: P; it has to divide H and W.
        reuse_input: the backward pass may write dx over x, which saves a map: for an x that nothing else reads
            afterwards and whose producer does not save its output, such as a convolution's. A second backward pass
            through the same graph then raises torch's error about a tensor changed in place. Compiled code allocates.

    Returns:
        BnReluPool(y [N, C, H, W], pooled [N, C, P, P] in x's dtype, mean [C], var [C] fp32 (fp64 for fp64)).

    Raises:
        ValueError: a shape does not fit, pool does not divide H and W, or batch statistics of one value.
        TypeError: a dtype does not fit.
        BackendError: the backend asked for cannot run here.
    """
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together, got only one; pass both or neither")
    given = not training and running_mean is not None
    y, pooled, mean, var, _ = _bn_relu_pool(
        x,
        gamma,
        beta,
        running_mean if given else None,
        running_var if given else None,
        eps,
        pool,
        reuse_input,
    )
    if training and running_mean is not None and running_var is not None and x.shape[0] > 0:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return BnReluPool(y, pooled, mean, var)


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _check(
    x: Tensor, gamma: Tensor, beta: Tensor, given_mean: Tensor | None, given_var: Tensor | None, pool: int
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {_shape(x)}; use torch's batch_norm for other shapes")
    if x.dtype not in _FLOATS:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}; cast it")
    samples, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"x must have at least one channel, row and column, got {_shape(x)}")
    if pool < 1 or height % pool or width % pool:
        raise ValueError(
            f"pool must divide both sides of the map {height} x {width}, got {pool}; elsewhere use torch's "
            "batch_norm, relu and adaptive_avg_pool2d"
        )
    given = {"given_mean": given_mean, "given_var": given_var}
    for name, tensor in {"gamma": gamma, "beta": beta, **given}.items():
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            raise ValueError(f"{name} must be [{channels}] to fit x {_shape(x)}, got {_shape(tensor)}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(
                f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}; cast it"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move it with .to(x.device)")
    if given_mean is None and samples * height * width == 1:
        raise ValueError(
            f"batch statistics need more than 1 value per channel, got x {_shape(x)}; use a larger batch or "
            "evaluation mode"
        )


def _is_channels_last(x: Tensor) -> bool:
    if x.is_contiguous():
        # With one pixel a map the two formats are one, and rows of channels are the longer runs.
        return x.shape[2] == 1 and x.shape[3] == 1
    return x.is_contiguous(memory_format=torch.channels_last)


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _empty_map(x: Tensor) -> Tensor:
    """Like x, in x's memory format if it has one of the two."""
    samples, channels, height, width = x.shape
    if _is_channels_last(x):
        return x.new_empty(samples, height, width, channels).permute(0, 3, 1, 2)
    return x.new_empty(samples, channels, height, width)


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty(x: Tensor, pool: int) -> Outputs:
    samples, channels = x.shape[:2]
    sums = _sums_dtype(x)
    return (
        _empty_map(x),
        x.new_empty(samples, channels, pool, pool),
        x.new_empty(channels, dtype=sums),
        x.new_empty(channels, dtype=sums),
        x.new_empty(2, samples, channels, pool, pool, dtype=sums),
    )


def _empty_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    channels, sums = x.shape[1], _sums_dtype(x)
    return x.new_empty(channels, dtype=sums), x.new_empty(channels, dtype=sums)


def _run(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    pool: int,
    reuse_input: bool,
) -> Outputs:
    _check(x, gamma, beta, given_mean, given_var, pool)
    run: Callable[..., Outputs] = _FORWARD.resolve(x.device.type, x.dtype)
    if x.shape[0] == 0:
        y, pooled, mean, var, moments = _empty(x, pool)
        if given_mean is not None and given_var is not None:
            return y, pooled, mean.copy_(given_mean), var.copy_(given_var), moments
        return y, pooled, mean.zero_(), var.zero_(), moments
    return run(_dense(x, _is_channels_last(x)), gamma, beta, given_mean, given_var, eps, pool)


def _run_backward(
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> Gradients:
    x = _dense(x, _is_channels_last(x))
    dx = _empty_map(x)
    return dx, *_write_gradients(dx, dy, dpooled, x, gamma, beta, mean, var, moments, batch_statistics, eps)


def _run_backward_over_x(
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    dense = _dense(x, _is_channels_last(x))
    sums = _write_gradients(dense, dy, dpooled, dense, gamma, beta, mean, var, moments, batch_statistics, eps)
    if dense is not x:
        x.copy_(dense)
    return sums


def _write_gradients(
    dx: Tensor,
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Fills dx, which may be x, and returns dgamma and dbeta."""
    run: Callable[..., tuple[Tensor, Tensor]] = _BACKWARD.resolve(x.device.type, x.dtype)
    if x.shape[0] == 0:
        dgamma, dbeta = _empty_sums(x)
        return dgamma.zero_(), dbeta.zero_()
    dy = None if dy is None else _dense(dy, _is_channels_last(x))
    return run(dx, dy, dpooled.contiguous(), x, gamma, beta, mean, var, moments, batch_statistics, eps)


def _fake(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    pool: int,
    reuse_input: bool,
) -> Outputs:
    _check(x, gamma, beta, given_mean, given_var, pool)
    return _empty(x, pool)


def _fake_backward(
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> Gradients:
    return _empty_map(x), *_empty_sums(x)


def _fake_backward_over_x(
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _empty_sums(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, gamma, beta, given_mean, _, eps, _, reuse_input = inputs
    _, pooled, mean, var, moments = output
    ctx.mark_non_differentiable(mean, var, moments)
    # A critic's gradient arrives through pooled alone: don't fill a map with zeros for y.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gamma, beta, mean, var, moments)
    ctx.batch_statistics = given_mean is None
    ctx.eps = eps
    ctx.pooled_shape = pooled.shape
    ctx.reuse_input = reuse_input


def _backward(ctx: Any, dy: Tensor | None, dpooled: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None and dpooled is None:
        return (None,) * 8
    if torch.is_grad_enabled():
        raise RuntimeError(
            "bn_relu_pool is differentiable once, and create_graph=True asks for more; "
            "use torch.nn.functional.batch_norm, relu and avg_pool2d there"
        )
    x, gamma, beta, mean, var, moments = ctx.saved_tensors
    if dpooled is None:
        dpooled = x.new_zeros(ctx.pooled_shape)
    inputs = dy, dpooled, x, gamma, beta, mean, var, moments, ctx.batch_statistics, ctx.eps
    # What a compiler traces must not write over its input. Torch 2.11 says of a backward that it is not compiling; its
    # tensors are then of another kind.
    traced = torch.compiler.is_compiling() or type(x) is not Tensor
    if ctx.reuse_input and ctx.needs_input_grad[0] and not traced:
        dgamma, dbeta = _bn_relu_pool_backward_(*inputs)
        # Whoever reads x again is told.
        torch.autograd.graph.increment_version(x)
        dx = x.detach()
    else:
        dx, dgamma, dbeta = _bn_relu_pool_backward(*inputs)
    return dx, dgamma.to(gamma.dtype), dbeta.to(beta.dtype), *(None,) * 5


def _in_format_of(x: Tensor, result: Tensor) -> Tensor:
    # Plain torch may leave either format; the schema's shape function promises x's.
    out = _empty_map(x)
    return result if result.stride() == out.stride() else out.copy_(result)


def _reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    pool: int,
) -> Outputs:
    y, *rest = reference.bn_relu_pool(x, gamma, beta, given_mean, given_var, eps, pool)
    pooled, mean, var, moments = rest
    return _in_format_of(x, y), pooled, mean, var, moments


def _reference_backward(
    dx: Tensor,
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    result, dgamma, dbeta = reference.bn_relu_pool_backward(
        dy, dpooled, x, gamma, beta, mean, var, moments, batch_statistics, eps
    )
    dx.copy_(result)
    return dgamma, dbeta


def _float(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _sizes(x: Tensor, pool: int) -> tuple[int, ...]:
    return (*x.shape, pool, int(_is_channels_last(x)), _NATIVE_DTYPE[x.dtype])


def _native_forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    pool: int,
) -> Outputs:
    native: Any = _native.load()
    out = y, pooled, mean, var, moments = _empty(x, pool)
    given = given_mean is not None and given_var is not None
    if given_mean is not None and given_var is not None:
        mean.copy_(given_mean)
        var.copy_(given_var)
    # Kept in names: an address does not keep its tensor alive.
    gamma, beta = _float(gamma), _float(beta)
    sizes = _sizes(x, pool)
    threads = torch.get_num_threads()
    workspace = x.new_empty(native.bn_relu_pool_cpu_workspace(*sizes, threads), dtype=torch.uint8)
    native.bn_relu_pool_cpu(
        x.data_ptr(),
        gamma.data_ptr(),
        beta.data_ptr(),
        y.data_ptr(),
        pooled.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        moments.data_ptr(),
        workspace.data_ptr(),
        *sizes,
        not given,
        eps,
        threads,
    )
    return out


def _native_backward(
    dx: Tensor,
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    native: Any = _native.load()
    out = dgamma, dbeta = _empty_sums(x)
    gamma, beta = _float(gamma), _float(beta)
    sizes = _sizes(x, dpooled.shape[2])
    threads = torch.get_num_threads()
    size = native.bn_relu_pool_backward_cpu_workspace(*sizes, dy is not None, threads)
    workspace = x.new_empty(size, dtype=torch.uint8)
    native.bn_relu_pool_backward_cpu(
        _address(dy),
        dpooled.data_ptr(),
        x.data_ptr(),
        gamma.data_ptr(),
        beta.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        moments.data_ptr(),
        dx.data_ptr(),
        dgamma.data_ptr(),
        dbeta.data_ptr(),
        workspace.data_ptr(),
        *sizes,
        batch_statistics,
        eps,
        threads,
    )
    return out


def _triton_forward(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    given_mean: Tensor | None,
    given_var: Tensor | None,
    eps: float,
    pool: int,
) -> Outputs:
    from lct_fast.kernels import bn_relu_pool as kernels

    out = y, pooled, mean, var, moments = _empty(x, pool)
    given = given_mean is not None and given_var is not None
    if given_mean is not None and given_var is not None:
        mean.copy_(given_mean)
        var.copy_(given_var)
    with torch.cuda.device(x.get_device()):
        kernels.bn_relu_pool(
            x, gamma.contiguous(), beta.contiguous(), given, eps, y, pooled, mean, var, moments,
            channels_last=_is_channels_last(x),
        )  # fmt: skip
    return out


def _triton_backward(
    dx: Tensor,
    dy: Tensor | None,
    dpooled: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    moments: Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from lct_fast.kernels import bn_relu_pool as kernels

    out = dgamma, dbeta = _empty_sums(x)
    with torch.cuda.device(x.get_device()):
        kernels.bn_relu_pool_backward(
            dy, dpooled, x, gamma.contiguous(), beta.contiguous(), mean, var, moments, batch_statistics, eps,
            dx, dgamma, dbeta, channels_last=_is_channels_last(x),
        )  # fmt: skip
    return out


_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton",)}
_KERNEL_DTYPES = frozenset(_NATIVE_DTYPE)

_FORWARD = Op(
    "bn_relu_pool",
    {
        "reference": Backend(_reference, available.always),
        "cpu": Backend(_native_forward, available.cpu, _KERNEL_DTYPES),
        "triton": Backend(_triton_forward, available.triton, _KERNEL_DTYPES),
    },
    _PREFERENCE,
)
_BACKWARD = Op(
    "bn_relu_pool_backward",
    {
        "reference": Backend(_reference_backward, available.always),
        "cpu": Backend(_native_backward, available.cpu, _KERNEL_DTYPES),
        "triton": Backend(_triton_backward, available.triton, _KERNEL_DTYPES),
    },
    _PREFERENCE,
)

_bn_relu_pool = register(
    "bn_relu_pool(Tensor x, Tensor gamma, Tensor beta, Tensor? given_mean, Tensor? given_var, float eps, "
    "int pool, bool reuse_input) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _backward,
)
_bn_relu_pool_backward = register(
    "bn_relu_pool_backward(Tensor? dy, Tensor dpooled, Tensor x, Tensor gamma, Tensor beta, Tensor mean, "
    "Tensor var, Tensor moments, bool batch_statistics, float eps) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_bn_relu_pool_backward_ = register(
    "bn_relu_pool_backward_(Tensor? dy, Tensor dpooled, Tensor(a!) x, Tensor gamma, Tensor beta, Tensor mean, "
    "Tensor var, Tensor moments, bool batch_statistics, float eps) -> (Tensor, Tensor)",
    _run_backward_over_x,
    _fake_backward_over_x,
)
