"""Declares ops to torch, under `torch.ops.lct`.

`Library.define` rather than `custom_op`, which adds half as much again to the cost of a call; the op is
opaque to the compiler either way, so the backend is chosen when it runs.
"""

from collections.abc import Callable
from typing import Any

import torch

_NAMESPACE = "lct"
# Lives as long as the process: the ops vanish with it.
_LIBRARY: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Declare one op and return it, ready to call.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", the outputs fresh tensors that alias no input; a `Tensor(a!) x` is
            written.
        run: computes it on any device.
        fake: shapes, dtypes and strides of what `run` returns.
        setup_context, backward: the autograd formula, if it has one.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"{_NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
    return getattr(getattr(torch.ops, _NAMESPACE), name).default
