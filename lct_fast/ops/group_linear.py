"""group_linear: a group that is a linear layer and its activation, with its linear critic's logits.

The formula is in `lct_fast.reference.group_linear`, the kernels' contract in csrc/include/lct/group_linear.h.
This file holds the op itself: schema, checks, shapes, autograd formula and backends.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lct_fast import _native
from lct_fast.ops import available
from lct_fast.ops.backend import Backend, Op
from lct_fast.ops.register import register
from lct_fast.reference import group_linear as reference

_NATIVE_DTYPE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NATIVE_ACTIVATION = {"none": 0, "relu": 1, "gelu": 2}

# From this many classes on the logits are a matrix product of their own: worth its own launch, and too wide to be
# held beside a tile of h.
UNFUSED_CLASSES = 64

Outputs = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor]


class GroupLinear(NamedTuple):
    """What `group_linear` returns; logits are None without critic_weight."""

    h: Tensor
    logits: Tensor | None


def group_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    critic_weight: Tensor | None = None,
    critic_bias: Tensor | None = None,
) -> GroupLinear:
    """A linear layer, its activation and the logits of a linear critic, in one pass for up to 63 classes.

    h = act(x weight^T + bias) goes to the next group; logits = h critic_weight^T + critic_bias, of h as rounded.
    For fewer than 64 classes the logits are made where h is, and h is not read back; from 64 on they are
    `torch.nn.functional.linear` of h, with the same meaning. "gelu" is torch's default, with erf.

    Differentiable (once) in every tensor, through h, logits or both; nothing is filled with zeros for the one that
    has no gradient. The activation and the critic's share of h's gradient are one pass; dx and the weights'
    gradients are torch's matrix products. relu's backward reads h, gelu's the derivative, which the forward then
    keeps in x's dtype; "none" keeps neither.

    Sums are fp32. h, logits and the bias's gradient have the same bits on every run.

    Args:
        x: [N, I] float32, float16 or bfloat16 (float64 on backend `reference`). N may be 0.
        weight: [O, I], any of those dtypes, not necessarily x's (float64 only together).
        bias: [O] in weight's dtype, or None.
        activation: "none", "relu" or "gelu".
        critic_weight: [V, O], any of those dtypes, or None.
        critic_bias: [V] in critic_weight's dtype, or None.

    Tensors that are not contiguous are copied first.

    Returns:
        GroupLinear(h [N, O], logits [N, V] or None), both in x's dtype.

    Raises:
        ValueError: a shape or activation does not fit.
        TypeError: a dtype does not fit.
        BackendError: the backend asked for cannot run here.
    """
    _check(x, weight, bias, activation, critic_weight, critic_bias)
    leaves = (x, weight, bias, critic_weight, critic_bias)
    keep = (
        activation == "gelu"
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in leaves)
    )
    if critic_weight is None:
        return GroupLinear(_group_linear(x, weight, bias, activation, None, None, keep)[0], None)
    if critic_weight.shape[0] < UNFUSED_CLASSES:
        h, logits, _ = _group_linear(x, weight, bias, activation, critic_weight, critic_bias, keep)
        return GroupLinear(h, logits)
    h = _group_linear(x, weight, bias, activation, None, None, keep)[0]
    shift = None if critic_bias is None else critic_bias.to(h.dtype)
    return GroupLinear(h, linear(h, critic_weight.to(h.dtype), shift))


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def _check_pair(name: str, weight: Tensor, bias_name: str, bias: Tensor | None, x: Tensor) -> None:
    if weight.dtype not in _NATIVE_DTYPE and weight.dtype != torch.float64:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {weight.dtype}; cast it")
    if (weight.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"float64 x and {name} go together, got x {x.dtype} and {name} {weight.dtype}; cast")
    _check_device(name, weight, x)
    if bias is None:
        return
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"{bias_name} must be [{weight.shape[0]}] to fit {name}, got {_shape(bias)}")
    if bias.dtype != weight.dtype:
        raise TypeError(f"{bias_name} must have {name}'s dtype {weight.dtype}, got {bias.dtype}; cast it")
    _check_device(bias_name, bias, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move {name} with .to(x.device)")


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    critic_weight: Tensor | None,
    critic_bias: Tensor | None,
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [N, I], got {_shape(x)}; flatten it first, as in x.flatten(1)")
    if x.shape[1] == 0:
        raise ValueError(f"x must have at least one column, got {_shape(x)}")
    if x.dtype not in _NATIVE_DTYPE and x.dtype != torch.float64:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}; cast it")
    if activation not in _NATIVE_ACTIVATION:
        raise ValueError(f"activation must be 'none', 'relu' or 'gelu', got '{activation}'")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [O, {x.shape[1]}] to fit x {_shape(x)}, got {_shape(weight)}")
    _check_pair("weight", weight, "bias", bias, x)
    if critic_weight is None:
        if critic_bias is not None:
            raise ValueError("critic_bias needs a critic_weight, got none; pass both")
        return
    outputs = weight.shape[0]
    if critic_weight.dim() != 2 or critic_weight.shape[1] != outputs or critic_weight.shape[0] == 0:
        raise ValueError(
            f"critic_weight must be [V, {outputs}] to fit weight {_shape(weight)}, got {_shape(critic_weight)}"
        )
    _check_pair("critic_weight", critic_weight, "critic_bias", critic_bias, x)


def _check_fused(critic_weight: Tensor | None) -> None:
    if critic_weight is not None and critic_weight.shape[0] >= UNFUSED_CLASSES:
        raise ValueError(
            f"the op fuses fewer than {UNFUSED_CLASSES} classes, got {critic_weight.shape[0]}; "
            "call lct_fast.ops.group_linear, or linear on h"
        )


def _check_backward(
    dh: Tensor | None,
    dlogits: Tensor | None,
    critic_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
) -> None:
    like, outputs = _gradient(dh, dlogits, critic_weight)
    rows = like.shape[0]
    if activation not in _NATIVE_ACTIVATION:
        raise ValueError(f"activation must be 'none', 'relu' or 'gelu', got '{activation}'")
    if activation != "none" and (gate is None or gate.shape != (rows, outputs)):
        got = "none" if gate is None else _shape(gate)
        raise ValueError(
            f"gate must be [{rows}, {outputs}], relu's h or gelu's slope, got {got}; run the forward with keep=True"
        )
    if dlogits is not None:
        classes = dlogits.shape[1]
        if dlogits.shape[0] != rows or critic_weight is None or critic_weight.shape != (classes, outputs):
            got = "none" if critic_weight is None else _shape(critic_weight)
            raise ValueError(
                f"dlogits must be [{rows}, V] with a critic_weight [V, {outputs}], got {_shape(dlogits)} and {got}; "
                "pass both as the forward had them"
            )
        _check_fused(critic_weight)
    for name, x in (("dh", dh), ("dlogits", dlogits), ("gate", gate)):
        if x is not None and x.dtype != like.dtype:
            raise TypeError(f"{name} must have the gradients' dtype {like.dtype}, got {x.dtype}; cast it")


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _empty(x: Tensor, weight: Tensor, critic_weight: Tensor | None, keep: bool) -> Outputs:
    rows, outputs = x.shape[0], weight.shape[0]
    return (
        x.new_empty(rows, outputs),
        x.new_empty(rows, 0 if critic_weight is None else critic_weight.shape[0]),
        x.new_empty(rows, outputs if keep else 0),
    )


def _empty_backward(dh: Tensor | None, dlogits: Tensor | None, critic_weight: Tensor | None) -> Gradients:
    like, outputs = _gradient(dh, dlogits, critic_weight)
    sums = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(like.shape[0], outputs), like.new_empty(outputs, dtype=sums)


def _gradient(dh: Tensor | None, dlogits: Tensor | None, critic_weight: Tensor | None) -> tuple[Tensor, int]:
    """A gradient that is there, and the number of outputs."""
    if dh is not None:
        return dh, dh.shape[1]
    if dlogits is None or critic_weight is None:
        raise ValueError("expected dh, or dlogits and critic_weight, got neither; pass one")
    return dlogits, critic_weight.shape[1]


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    critic_weight: Tensor | None,
    critic_bias: Tensor | None,
    keep: bool,
) -> Outputs:
    _check(x, weight, bias, activation, critic_weight, critic_bias)
    _check_fused(critic_weight)
    run: Callable[..., Outputs] = _FORWARD.resolve(x.device.type, x.dtype)
    if x.shape[0] == 0:
        return _empty(x, weight, critic_weight, keep)
    tensors = (x.contiguous(), weight.contiguous(), _dense(bias))
    return run(*tensors, activation, _dense(critic_weight), _dense(critic_bias), keep)


def _run_backward(
    dh: Tensor | None,
    dlogits: Tensor | None,
    critic_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
) -> Gradients:
    _check_backward(dh, dlogits, critic_weight, gate, activation)
    like, _ = _gradient(dh, dlogits, critic_weight)
    run: Callable[..., Gradients] = _BACKWARD.resolve(like.device.type, like.dtype)
    if like.shape[0] == 0:
        dpre, dbias = _empty_backward(dh, dlogits, critic_weight)
        return dpre, dbias.zero_()
    return run(_dense(dh), _dense(dlogits), _dense(critic_weight), _dense(gate), activation)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    critic_weight: Tensor | None,
    critic_bias: Tensor | None,
    keep: bool,
) -> Outputs:
    _check(x, weight, bias, activation, critic_weight, critic_bias)
    _check_fused(critic_weight)
    return _empty(x, weight, critic_weight, keep)


def _fake_backward(
    dh: Tensor | None,
    dlogits: Tensor | None,
    critic_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
) -> Gradients:
    _check_backward(dh, dlogits, critic_weight, gate, activation)
    return _empty_backward(dh, dlogits, critic_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, weight, bias, activation, critic_weight, critic_bias, _ = inputs
    h, logits, slope = output
    ctx.mark_non_differentiable(*((slope,) if critic_weight is not None else (logits, slope)))
    # A critic's gradient arrives through logits alone: don't fill a tensor of h's size with zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x,
        weight,
        critic_weight,
        h if activation == "relu" or critic_weight is not None else None,
        slope if activation == "gelu" else None,
    )
    ctx.activation = activation
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.critic_bias_dtype = None if critic_bias is None else critic_bias.dtype


def _product(a: Tensor, b: Tensor) -> Tensor:
    # torch has no fast fp16 product on the CPU; in fp32 the sums are the same.
    if a.dtype == torch.float16 and a.device.type == "cpu":
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


def _backward(ctx: Any, dh: Tensor | None, dlogits: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dh is None and dlogits is None:
        return (None,) * 7
    if torch.is_grad_enabled():
        raise RuntimeError(
            "group_linear is differentiable once, and create_graph=True asks for more; "
            "use torch.nn.functional.linear and the activation there"
        )
    dh, dlogits = _dense(dh), _dense(dlogits)
    x, weight, critic_weight, h, slope = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, needs_critic, needs_shift, _ = ctx.needs_input_grad
    dx = dweight = dbias = dcritic = dshift = None
    if needs_x or needs_weight or needs_bias:
        dpre, dbias = _dpre(dh, dlogits, critic_weight, h, slope, ctx.activation)
        dbias = dbias.to(ctx.bias_dtype) if needs_bias else None
        if needs_x:
            dx = _product(dpre, weight.to(x.dtype))
        if needs_weight:
            dweight = _product(dpre.T, x).to(weight.dtype)
    if dlogits is not None and needs_critic:
        dcritic = _product(dlogits.T, h).to(critic_weight.dtype)
    if dlogits is not None and needs_shift:
        dshift = dlogits.sum(0, dtype=_sums_dtype(dlogits)).to(ctx.critic_bias_dtype)
    return dx, dweight, dbias, None, dcritic, dshift, None


def _sums_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _dpre(
    dh: Tensor | None,
    dlogits: Tensor | None,
    critic_weight: Tensor | None,
    h: Tensor | None,
    slope: Tensor | None,
    activation: str,
) -> Gradients:
    if activation == "none" and dlogits is None and dh is not None:
        return dh, dh.sum(0, dtype=_sums_dtype(dh))
    gate = {"none": None, "relu": h, "gelu": slope}[activation]
    return _group_linear_backward(dh, dlogits, None if dlogits is None else critic_weight, gate, activation)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    critic_weight: Tensor | None,
    critic_bias: Tensor | None,
    keep: bool,
) -> Outputs:
    h, logits, slope = reference.group_linear(x, weight, bias, activation, critic_weight, critic_bias)
    _, absent_logits, absent_slope = _empty(x, weight, None, False)
    return h, absent_logits if logits is None else logits, slope if keep else absent_slope


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _native_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    critic_weight: Tensor | None,
    critic_bias: Tensor | None,
    keep: bool,
) -> Outputs:
    native: Any = _native.load()
    out = h, logits, slope = _empty(x, weight, critic_weight, keep)
    sizes = (*x.shape, weight.shape[0], logits.shape[1])
    critic_dtype = x.dtype if critic_weight is None else critic_weight.dtype
    threads = torch.get_num_threads()
    size = native.group_linear_cpu_workspace(*sizes, _NATIVE_DTYPE[x.dtype], threads)
    workspace = x.new_empty(size, dtype=torch.uint8)
    native.group_linear_cpu(
        x.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        _address(critic_weight),
        _address(critic_bias),
        h.data_ptr(),
        logits.data_ptr(),
        slope.data_ptr() if keep else 0,
        workspace.data_ptr(),
        *sizes,
        _NATIVE_DTYPE[x.dtype],
        _NATIVE_DTYPE[weight.dtype],
        _NATIVE_DTYPE[critic_dtype],
        _NATIVE_ACTIVATION[activation],
        threads,
    )
    return out


def _native_backward(
    dh: Tensor | None,
    dlogits: Tensor | None,
    critic_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
) -> Gradients:
    native: Any = _native.load()
    out = dpre, dbias = _empty_backward(dh, dlogits, critic_weight)
    sizes = (*dpre.shape, 0 if dlogits is None else dlogits.shape[1])
    critic_dtype = dpre.dtype if critic_weight is None else critic_weight.dtype
    threads = torch.get_num_threads()
    size = native.group_linear_backward_cpu_workspace(*sizes, threads)
    workspace = dpre.new_empty(size, dtype=torch.uint8)
    native.group_linear_backward_cpu(
        _address(dh),
        _address(dlogits),
        _address(critic_weight),
        _address(gate),
        dpre.data_ptr(),
        dbias.data_ptr(),
        workspace.data_ptr(),
        *sizes,
        _NATIVE_DTYPE[dpre.dtype],
        _NATIVE_DTYPE[critic_dtype],
        _NATIVE_ACTIVATION[activation],
        threads,
    )
    return out


def _triton_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    critic_weight: Tensor | None,
    critic_bias: Tensor | None,
    keep: bool,
) -> Outputs:
    from lct_fast.kernels import group_linear as kernels

    out = h, logits, slope = _empty(x, weight, critic_weight, keep)
    with torch.cuda.device(x.get_device()):
        kernels.group_linear(
            x, weight, bias, activation, critic_weight, critic_bias,
            h, None if critic_weight is None else logits, slope if keep else None,
        )  # fmt: skip
    return out


def _triton_backward(
    dh: Tensor | None,
    dlogits: Tensor | None,
    critic_weight: Tensor | None,
    gate: Tensor | None,
    activation: str,
) -> Gradients:
    from lct_fast.kernels import group_linear as kernels

    out = dpre, dbias = _empty_backward(dh, dlogits, critic_weight)
    with torch.cuda.device(dpre.get_device()):
        kernels.group_linear_backward(dh, dlogits, critic_weight, gate, activation, dpre, dbias)
    return out


_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton",)}
_KERNEL_DTYPES = frozenset(_NATIVE_DTYPE)

_FORWARD = Op(
    "group_linear",
    {
        "reference": Backend(_reference, available.always),
        "cpu": Backend(_native_forward, available.cpu, _KERNEL_DTYPES),
        "triton": Backend(_triton_forward, available.triton, _KERNEL_DTYPES),
    },
    _PREFERENCE,
)
_BACKWARD = Op(
    "group_linear_backward",
    {
        "reference": Backend(reference.group_linear_backward, available.always),
        "cpu": Backend(_native_backward, available.cpu, _KERNEL_DTYPES),
        "triton": Backend(_triton_backward, available.triton, _KERNEL_DTYPES),
    },
    _PREFERENCE,
)

_group_linear = register(
    "group_linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? critic_weight, "
    "Tensor? critic_bias, bool keep) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _backward,
)
_group_linear_backward = register(
    "group_linear_backward(Tensor? dh, Tensor? dlogits, Tensor? critic_weight, Tensor? gate, "
    "str activation) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
