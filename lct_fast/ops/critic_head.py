"""critic_head: a linear head, softmax cross-entropy and every gradient of them, in one pass.

The formula is in `lct_fast.reference.critic_head`, the kernels' contract in csrc/include/lct/critic_head.h.
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
from lct_fast.reference import critic_head as reference

_NATIVE_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NATIVE_ACTIVATION = {"none": 0, "relu": 1}

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class CriticHead(NamedTuple):
    """What `critic_head` returns; dweight and dbias are None unless row_scale was given."""

    loss: Tensor
    dlogits: Tensor
    dh: Tensor
    dweight: Tensor | None
    dbias: Tensor | None


def critic_head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None = None,
    activation: str = "none",
    ignore_index: int = -100,
) -> CriticHead:
    """Cross-entropy of a linear head and its gradients, in one pass over h.

    With a = act(h) and logits = a weight^T + bias: loss_n = logsumexp(logits_n) - logits_n[target_n],
    dlogits = softmax - onehot (never scaled), dh = scale * (dlogits weight) * act'(h) (scaled before it is
    rounded), dweight = sum_n row_scale_n dlogits_n (x) a_n, dbias = sum_n row_scale_n dlogits_n. Sums are
    fp32 and give the same bits on every run.

    A row with target == ignore_index has loss 0 and zero gradients. A target outside [0, V) has loss NaN
    and zero gradients; nothing is read out of bounds.

    loss is differentiable (once) with respect to h, weight and bias; the other outputs are gradients
    already and carry none.

    Args:
        h: [N, D] float32, float16 or bfloat16 (float64 on backend `reference`). N may be 0.
        weight: [V, D], any of those dtypes, not necessarily h's (float64 only together).
        bias: [V] in weight's dtype, or None.
        target: [N] int64.
        scale: 0-dim float32 on h's device, for a mean over rows 1/N.
        row_scale: [N] float32 or None; the whole factor of each row in dweight and dbias, 1/N included.
        activation: "none" or "relu", applied to h.
        ignore_index: label of the rows to leave out.

    Tensors that are not contiguous are copied first. For float64 h, scale and row_scale may be float64.

    Returns:
        CriticHead(loss [N] fp32 (fp64 for fp64 h), dlogits [N, V] and dh [N, D] in h's dtype, dweight
        [V, D] and dbias [V] in weight's dtype, or None and None without row_scale).

    Raises:
        ValueError: a shape or activation does not fit.
        TypeError: a dtype does not fit.
        BackendError: the backend asked for cannot run here.
    """
    out = _critic_head(h, weight, bias, target, scale, row_scale, activation, ignore_index)
    if row_scale is None:
        return CriticHead(out[0], out[1], out[2], None, None)
    return CriticHead(*out)


def critic_head_wgrad(
    h: Tensor,
    dlogits: Tensor,
    row_scale: Tensor,
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight gradients of `critic_head` alone, for a row_scale that arrives after its pass.

    dweight = sum_n row_scale_n dlogits_n (x) act(h)_n and dbias = sum_n row_scale_n dlogits_n.

    Args:
        h: [N, D], as it was given to `critic_head`.
        dlogits: [N, V] in h's dtype, as `critic_head` returned it.
        row_scale: [N] float32 (or float64 for float64 h), for a local critic sign * 1/N.
        activation: "none" or "relu".
        dtype: of the results: float32, float16 or bfloat16; None is float32, float64 for float64 h.

    Returns:
        dweight [V, D] and dbias [V].

    Raises:
        ValueError, TypeError, BackendError: as `critic_head`.
    """
    dweight, dbias = _critic_head_wgrad(h, dlogits, row_scale, activation, dtype)
    return dweight, dbias


def _check_h(h: Tensor, activation: str) -> None:
    if h.dim() != 2:
        raise ValueError(f"h must be [N, D], got {_shape(h)}; flatten it first, as in h.flatten(1)")
    if h.shape[1] == 0:
        raise ValueError(f"h must have at least one column, got {_shape(h)}")
    if h.dtype not in _NATIVE_DTYPE and h.dtype != torch.float64:
        raise TypeError(f"h must be float32, float16, bfloat16 or float64, got {h.dtype}; cast it")
    if activation not in _NATIVE_ACTIVATION:
        raise ValueError(f"activation must be 'none' or 'relu', got '{activation}'")


def _check_float_like_h(name: str, x: Tensor, h: Tensor) -> None:
    if x.dtype != torch.float32 and not (x.dtype == torch.float64 and h.dtype == torch.float64):
        raise TypeError(f"{name} must be float32, got {x.dtype}; use {name}.float()")


def _check_device(name: str, x: Tensor, h: Tensor) -> None:
    if x.device != h.device:
        raise ValueError(f"{name} is on {x.device} and h on {h.device}; move {name} with .to(h.device)")


def _check(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    activation: str,
) -> None:
    _check_h(h, activation)
    rows, depth = h.shape
    if weight.dim() != 2 or weight.shape[1] != depth or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, {depth}] to fit h {_shape(h)}, got {_shape(weight)}")
    if weight.dtype not in _NATIVE_DTYPE and weight.dtype != torch.float64:
        raise TypeError(f"weight must be float32, float16, bfloat16 or float64, got {weight.dtype}; cast it")
    if (weight.dtype == torch.float64) != (h.dtype == torch.float64):
        raise TypeError(f"float64 h and weight go together, got h {h.dtype} and weight {weight.dtype}; cast")
    _check_device("weight", weight, h)
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"bias must be [{weight.shape[0]}] to fit weight, got {_shape(bias)}")
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias must have weight's dtype {weight.dtype}, got {bias.dtype}; cast it")
        _check_device("bias", bias, h)
    if target.dim() != 1 or target.shape[0] != rows:
        raise ValueError(f"target must be [{rows}], one class index a row of h, got {_shape(target)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {target.dtype}; use target.long()")
    _check_device("target", target, h)
    if scale.dim() != 0:
        raise ValueError(f"scale must be a 0-dim tensor, got {_shape(scale)}; use torch.tensor(1 / len(h))")
    _check_float_like_h("scale", scale, h)
    _check_device("scale", scale, h)
    if row_scale is not None:
        _check_row_scale(row_scale, h)


def _check_row_scale(row_scale: Tensor, h: Tensor) -> None:
    if row_scale.dim() != 1 or row_scale.shape[0] != h.shape[0]:
        raise ValueError(f"row_scale must be [{h.shape[0]}], one factor a row of h, got {_shape(row_scale)}")
    _check_float_like_h("row_scale", row_scale, h)
    _check_device("row_scale", row_scale, h)


def _check_wgrad(h: Tensor, dlogits: Tensor, row_scale: Tensor, activation: str, out: torch.dtype) -> None:
    _check_h(h, activation)
    if dlogits.dim() != 2 or dlogits.shape[0] != h.shape[0] or dlogits.shape[1] == 0:
        raise ValueError(f"dlogits must be [{h.shape[0]}, V] to fit h {_shape(h)}, got {_shape(dlogits)}")
    if dlogits.dtype != h.dtype:
        raise TypeError(f"dlogits must have h's dtype {h.dtype}, got {dlogits.dtype}; pass it as returned")
    _check_device("dlogits", dlogits, h)
    _check_row_scale(row_scale, h)
    if (out == torch.float64) != (h.dtype == torch.float64) or (
        out != torch.float64 and out not in _NATIVE_DTYPE
    ):
        raise TypeError(
            f"dtype must be float32, float16 or bfloat16 (float64 for float64 h), got {out} for h {h.dtype}"
        )


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _run(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    activation: str,
    ignore_index: int,
) -> Outputs:
    _check(h, weight, bias, target, scale, row_scale, activation)
    run: Callable[..., Outputs] = _HEAD.resolve(h.device.type, h.dtype, weight.shape[0])
    if h.shape[0] == 0:
        return _nothing(h, weight, row_scale)
    return run(
        h.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        target.contiguous(),
        scale,
        None if row_scale is None else row_scale.contiguous(),
        activation,
        ignore_index,
    )


def _run_wgrad(
    h: Tensor, dlogits: Tensor, row_scale: Tensor, activation: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    out = _wgrad_dtype(h, dtype)
    _check_wgrad(h, dlogits, row_scale, activation, out)
    run: Callable[..., tuple[Tensor, Tensor]] = _WGRAD.resolve(h.device.type, h.dtype, dlogits.shape[1])
    if h.shape[0] == 0:
        dweight, dbias = _empty_wgrad(h, dlogits, out)
        return dweight.zero_(), dbias.zero_()
    return run(h.contiguous(), dlogits.contiguous(), row_scale.contiguous(), activation, out)


def _fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    activation: str,
    ignore_index: int,
) -> Outputs:
    _check(h, weight, bias, target, scale, row_scale, activation)
    return _empty(h, weight, row_scale)


def _fake_wgrad(
    h: Tensor, dlogits: Tensor, row_scale: Tensor, activation: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    out = _wgrad_dtype(h, dtype)
    _check_wgrad(h, dlogits, row_scale, activation, out)
    return _empty_wgrad(h, dlogits, out)


def _empty(h: Tensor, weight: Tensor, row_scale: Tensor | None) -> Outputs:
    rows, depth = h.shape
    classes = weight.shape[0]
    absent = row_scale is None
    return (
        h.new_empty(rows, dtype=torch.float64 if h.dtype == torch.float64 else torch.float32),
        h.new_empty(rows, classes),
        h.new_empty(rows, depth),
        weight.new_empty(0) if absent else weight.new_empty(classes, depth),
        weight.new_empty(0) if absent else weight.new_empty(classes),
    )


def _nothing(h: Tensor, weight: Tensor, row_scale: Tensor | None) -> Outputs:
    # Without rows the addresses of inputs and outputs are null, which kernels read as "not asked for".
    loss, dlogits, dh, dweight, dbias = _empty(h, weight, row_scale)
    return loss, dlogits, dh, dweight.zero_(), dbias.zero_()


def _wgrad_dtype(h: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _empty_wgrad(h: Tensor, dlogits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    classes = dlogits.shape[1]
    return h.new_empty(classes, h.shape[1], dtype=dtype), h.new_empty(classes, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    h, weight, _, _, _, _, activation, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    # The other outputs' gradients are always absent: don't fill tensors of their size with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, weight, output[1])
    ctx.activation = activation


def _backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 8
    if torch.is_grad_enabled():
        raise RuntimeError(
            "critic_head is differentiable once, and create_graph=True asks for more; "
            "use torch.nn.functional.linear and cross_entropy there"
        )
    h, weight, dlogits = ctx.saved_tensors
    dh = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        wide = torch.promote_types(h.dtype, weight.dtype)
        # Scaled after the product and in dloss's precision: dloss / N would vanish in fp16.
        dh = dloss[:, None] * (dlogits.to(wide) @ weight.to(wide))
        if ctx.activation == "relu":
            dh = torch.where(h > 0, dh, 0.0)
        dh = dh.to(h.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dweight, dbias = critic_head_wgrad(h, dlogits, dloss, ctx.activation, weight.dtype)
    return (
        dh,
        dweight if ctx.needs_input_grad[1] else None,
        dbias if ctx.needs_input_grad[2] else None,
        *(None,) * 5,
    )


def _reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    activation: str,
    ignore_index: int,
) -> Outputs:
    loss, dlogits, dh, dweight, dbias = reference.critic_head(
        h, weight, bias, target, scale, row_scale, activation, ignore_index
    )
    if dweight is None or dbias is None:
        return loss, dlogits, dh, weight.new_empty(0), weight.new_empty(0)
    return loss, dlogits, dh, dweight, dbias


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _native_head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    activation: str,
    ignore_index: int,
) -> Outputs:
    native: Any = _native.load()
    out = loss, dlogits, dh, dweight, dbias = _empty(h, weight, row_scale)
    classes, depth = weight.shape
    sizes = (h.shape[0], depth, classes, _NATIVE_DTYPE[h.dtype], _NATIVE_DTYPE[weight.dtype])
    where: tuple[int, ...]
    if h.is_cuda:
        call, where = native.critic_head_cuda, _device_and_stream(h)
        size = native.critic_head_cuda_workspace(*sizes, row_scale is not None, where[0])
    else:
        call, where = native.critic_head_cpu, (torch.get_num_threads(),)
        size = native.critic_head_cpu_workspace(*sizes, row_scale is not None, *where)
    workspace = h.new_empty(size, dtype=torch.uint8)
    call(
        h.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        target.data_ptr(),
        scale.data_ptr(),
        _address(row_scale),
        loss.data_ptr(),
        dlogits.data_ptr(),
        dh.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        workspace.data_ptr(),
        *sizes,
        _NATIVE_ACTIVATION[activation],
        ignore_index,
        *where,
    )
    return out


def _native_wgrad(
    h: Tensor, dlogits: Tensor, row_scale: Tensor, activation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    native: Any = _native.load()
    out = dweight, dbias = _empty_wgrad(h, dlogits, dtype)
    classes, depth = dweight.shape
    sizes = (h.shape[0], depth, classes, _NATIVE_DTYPE[h.dtype], _NATIVE_DTYPE[dtype])
    where: tuple[int, ...]
    if h.is_cuda:
        call, where = native.critic_head_wgrad_cuda, _device_and_stream(h)
        size = native.critic_head_wgrad_cuda_workspace(*sizes, where[0])
    else:
        call, where = native.critic_head_wgrad_cpu, (torch.get_num_threads(),)
        size = native.critic_head_wgrad_cpu_workspace(*sizes, *where)
    workspace = h.new_empty(size, dtype=torch.uint8)
    call(
        h.data_ptr(),
        dlogits.data_ptr(),
        row_scale.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        workspace.data_ptr(),
        *sizes,
        _NATIVE_ACTIVATION[activation],
        *where,
    )
    return out


def _device_and_stream(h: Tensor) -> tuple[int, int]:
    index = h.get_device()
    return index, torch.cuda.current_stream(index).cuda_stream


def _triton_head(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
    activation: str,
    ignore_index: int,
) -> Outputs:
    from lct_fast.kernels import critic_head as kernels

    out = loss, dlogits, dh, dweight, dbias = _empty(h, weight, row_scale)
    gradients = (None, None) if row_scale is None else (dweight, dbias)
    with torch.cuda.device(h.get_device()):
        kernels.critic_head(
            h, weight, bias, target, scale, row_scale, activation, ignore_index, loss, dlogits, dh, *gradients
        )
    return out


def _triton_wgrad(
    h: Tensor, dlogits: Tensor, row_scale: Tensor, activation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from lct_fast.kernels import critic_head as kernels

    out = _empty_wgrad(h, dlogits, dtype)
    with torch.cuda.device(h.get_device()):
        kernels.critic_head_wgrad(h, dlogits, row_scale, activation, *out)
    return out


_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
_KERNEL_DTYPES = frozenset(_NATIVE_DTYPE)
# A row of logits is one tile in registers there.
_TRITON_CLASSES = 1024

_HEAD = Op(
    "critic_head",
    {
        "reference": Backend(_reference, available.always),
        "cpu": Backend(_native_head, available.cpu, _KERNEL_DTYPES),
        "triton": Backend(_triton_head, available.triton, _KERNEL_DTYPES, _TRITON_CLASSES),
        "cuda": Backend(_native_head, available.cuda, _KERNEL_DTYPES),
    },
    _PREFERENCE,
)
_WGRAD = Op(
    "critic_head_wgrad",
    {
        "reference": Backend(reference.critic_head_wgrad, available.always),
        "cpu": Backend(_native_wgrad, available.cpu, _KERNEL_DTYPES),
        "triton": Backend(_triton_wgrad, available.triton, _KERNEL_DTYPES, _TRITON_CLASSES),
        "cuda": Backend(_native_wgrad, available.cuda, _KERNEL_DTYPES),
    },
    _PREFERENCE,
)

_critic_head = register(
    "critic_head(Tensor h, Tensor weight, Tensor? bias, Tensor target, Tensor scale, Tensor? row_scale, "
    "str activation, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _backward,
)
_critic_head_wgrad = register(
    "critic_head_wgrad(Tensor h, Tensor dlogits, Tensor row_scale, str activation, "
    "ScalarType? dtype=None) -> (Tensor, Tensor)",
    _run_wgrad,
    _fake_wgrad,
)
