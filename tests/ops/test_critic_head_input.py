"""Input that does not fit is refused, eagerly and when traced: what was expected, what came, what to do."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lct_fast import ops
from tests.ops.critic_head_case import make

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "h of 4 dimensions": (
        {"h": torch.ones(6, 3, 2, 2)},
        ValueError,
        r"h must be \[N, D\], got \[6, 3, 2, 2\]; .*h.flatten\(1\)",
    ),
    "h without columns": ({"h": torch.ones(6, 0)}, ValueError, r"at least one column, got \[6, 0\]"),
    "h of integers": ({"h": torch.ones(6, 3).long()}, TypeError, "h must be float32.*got torch.int64; cast"),
    "weight transposed": (
        {"weight": torch.ones(3, 4)},
        ValueError,
        r"weight must be \[V, 3\] to fit h \[6, 3\], got \[3, 4\]",
    ),
    "weight without classes": ({"weight": torch.ones(0, 3)}, ValueError, r"got \[0, 3\]"),
    "weight of 1 dimension": ({"weight": torch.ones(3)}, ValueError, r"weight must be \[V, 3\].*got \[3\]"),
    "weight of integers": (
        {"weight": torch.ones(4, 3).int()},
        TypeError,
        "weight must be.*got torch.int32; cast",
    ),
    "weight float64 alone": (
        {"weight": torch.ones(4, 3).double()},
        TypeError,
        "go together, got h torch.float32 and weight torch.float64",
    ),
    "bias too long": ({"bias": torch.ones(5)}, ValueError, r"bias must be \[4\] to fit weight, got \[5\]"),
    "bias of another dtype": (
        {"bias": torch.ones(4).half()},
        TypeError,
        "bias must have weight's dtype torch.float32, got torch.float16",
    ),
    "target too short": ({"target": torch.zeros(5).long()}, ValueError, r"target must be \[6\].*got \[5\]"),
    "target one-hot": (
        {"target": torch.zeros(6, 4).long()},
        ValueError,
        r"target must be \[6\].*got \[6, 4\]",
    ),
    "target int32": (
        {"target": torch.zeros(6).int()},
        TypeError,
        r"int64.*got torch.int32; use target.long\(\)",
    ),
    "scale of 1 dimension": (
        {"scale": torch.ones(1)},
        ValueError,
        r"scale must be a 0-dim tensor, got \[1\]; use torch.tensor",
    ),
    "scale fp16": (
        {"scale": torch.tensor(1.0).half()},
        TypeError,
        r"scale must be float32, got torch.float16; use scale.float\(\)",
    ),
    "scale float64": (
        {"scale": torch.tensor(1.0).double()},
        TypeError,
        "scale must be float32, got torch.float64",
    ),
    "row_scale a column": (
        {"row_scale": torch.ones(6, 1)},
        ValueError,
        r"row_scale must be \[6\].*got \[6, 1\]",
    ),
    "row_scale bf16": ({"row_scale": torch.ones(6).bfloat16()}, TypeError, "row_scale must be float32, got"),
    "unknown activation": (
        {"activation": "gelu"},
        ValueError,
        "activation must be 'none' or 'relu', got 'gelu'",
    ),
    **{
        f"{name} on another device": (
            {
                name: torch.ones(
                    shape, device="meta", dtype=torch.int64 if name == "target" else torch.float32
                )
            },
            ValueError,
            f"{name} is on meta and h on cpu; move",
        )
        for name, shape in (("weight", (4, 3)), ("bias", 4), ("target", 6), ("scale", ()), ("row_scale", 6))
    },
}


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str) -> None:
    change, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        replace(make(6, 3, 4), **change).run()


@pytest.mark.parametrize("what", [what for what in WRONG if "device" not in what])
def test_refused_when_traced(what: str) -> None:
    change, error, message = WRONG[what]
    case = replace(make(6, 3, 4), **change)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in case.arguments()]
        with pytest.raises(error, match=message):
            ops.critic_head(*fake)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"dlogits": torch.ones(5, 4)},
            ValueError,
            r"dlogits must be \[6, V\] to fit h \[6, 3\], got \[5, 4\]",
        ),
        ({"dlogits": torch.ones(6, 0)}, ValueError, r"got \[6, 0\]"),
        ({"dlogits": torch.ones(6, 4).half()}, TypeError, "dlogits must have h's dtype torch.float32, got"),
        ({"dlogits": torch.ones(6, 4, device="meta")}, ValueError, "dlogits is on meta and h on cpu"),
        ({"row_scale": torch.ones(7)}, ValueError, r"row_scale must be \[6\]"),
        ({"activation": "tanh"}, ValueError, "'none' or 'relu', got 'tanh'"),
        ({"dtype": torch.float64}, TypeError, "got torch.float64 for h torch.float32"),
        ({"dtype": torch.int8}, TypeError, "dtype must be float32.*got torch.int8"),
        ({"h": torch.ones(6)}, ValueError, r"h must be \[N, D\]"),
    ],
)
def test_wgrad_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "h": torch.ones(6, 3),
        "dlogits": torch.ones(6, 4),
        "row_scale": torch.ones(6),
    }
    with pytest.raises(error, match=message):
        ops.critic_head_wgrad(**{**arguments, **change})
