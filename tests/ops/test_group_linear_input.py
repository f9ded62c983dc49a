"""Input that does not fit is refused, eagerly and when traced: what was expected, what came, what to do."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lct_fast import _native, ops

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of 3 dimensions": (
        {"x": torch.ones(6, 3, 1)},
        ValueError,
        r"x must be \[N, I\], got \[6, 3, 1\]; .*x.flatten\(1\)",
    ),
    "x without columns": ({"x": torch.ones(6, 0)}, ValueError, r"at least one column, got \[6, 0\]"),
    "x of integers": ({"x": torch.ones(6, 3).long()}, TypeError, "x must be float32.*got torch.int64; cast"),
    "weight transposed": (
        {"weight": torch.ones(3, 4)},
        ValueError,
        r"weight must be \[O, 3\] to fit x \[6, 3\], got \[3, 4\]",
    ),
    "weight without outputs": ({"weight": torch.ones(0, 3)}, ValueError, r"weight must be.*got \[0, 3\]"),
    "weight of integers": (
        {"weight": torch.ones(4, 3).int()},
        TypeError,
        "weight must be float32.*got torch.int32; cast",
    ),
    "weight float64 alone": (
        {"weight": torch.ones(4, 3).double()},
        TypeError,
        "float64 x and weight go together, got x torch.float32 and weight torch.float64",
    ),
    "bias too long": ({"bias": torch.ones(5)}, ValueError, r"bias must be \[4\] to fit weight, got \[5\]"),
    "bias of another dtype": (
        {"bias": torch.ones(4).half()},
        TypeError,
        "bias must have weight's dtype torch.float32, got torch.float16",
    ),
    "unknown activation": (
        {"activation": "tanh"},
        ValueError,
        "activation must be 'none', 'relu' or 'gelu', got 'tanh'",
    ),
    "critic_weight of another width": (
        {"critic_weight": torch.ones(2, 5)},
        ValueError,
        r"critic_weight must be \[V, 4\] to fit weight \[4, 3\], got \[2, 5\]",
    ),
    "critic_weight without classes": (
        {"critic_weight": torch.ones(0, 4)},
        ValueError,
        r"critic_weight must be \[V, 4\].*got \[0, 4\]",
    ),
    "critic_weight float64 alone": (
        {"critic_weight": torch.ones(2, 4).double()},
        TypeError,
        "float64 x and critic_weight go together",
    ),
    "critic_bias alone": (
        {"critic_weight": None},
        ValueError,
        "critic_bias needs a critic_weight, got none; pass both",
    ),
    "critic_bias too short": (
        {"critic_bias": torch.ones(1)},
        ValueError,
        r"critic_bias must be \[2\] to fit critic_weight, got \[1\]",
    ),
    **{
        f"{name} on another device": (
            {name: torch.ones(shape, device="meta")},
            ValueError,
            f"{name} is on meta and x on cpu; move {name}",
        )
        for name, shape in (("weight", (4, 3)), ("bias", 4), ("critic_weight", (2, 4)), ("critic_bias", 2))
    },
}


def arguments(**change: Any) -> dict[str, Any]:
    given = {
        "x": torch.ones(6, 3),
        "weight": torch.ones(4, 3),
        "bias": torch.ones(4),
        "activation": "relu",
        "critic_weight": torch.ones(2, 4),
        "critic_bias": torch.ones(2),
    }
    return {**given, **change}


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str) -> None:
    change, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        ops.group_linear(**arguments(**change))


@pytest.mark.parametrize("what", [what for what in WRONG if "device" not in what])
def test_refused_when_traced(what: str) -> None:
    change, error, message = WRONG[what]
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments(**change).items()
        }
        with pytest.raises(error, match=message):
            ops.group_linear(**fake)


def test_the_op_under_the_function_fuses_few_classes_only() -> None:
    given = arguments(critic_weight=torch.ones(64, 4), critic_bias=torch.ones(64))
    with pytest.raises(ValueError, match="fewer than 64 classes, got 64; call lct_fast.ops.group_linear"):
        torch.ops.lct.group_linear(*given.values(), False)


def test_a_gradient_is_needed() -> None:
    with pytest.raises(ValueError, match="expected dh, or dlogits and critic_weight, got neither"):
        torch.ops.lct.group_linear_backward(None, None, torch.ones(2, 4), None, "none")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": None}, ValueError, r"gate must be \[6, 4\], .* got none; run the forward with keep=True"),
        ({"gate": torch.ones(6, 0)}, ValueError, r"gate must be \[6, 4\], .* got \[6, 0\]"),
        ({"gate": torch.ones(6, 4).half()}, TypeError, "gate must have the gradients' dtype torch.float32"),
        ({"dlogits": torch.ones(5, 2)}, ValueError, r"dlogits must be \[6, V\] .* got \[5, 2\] and \[2, 4\]"),
        ({"dlogits": torch.ones(6, 3)}, ValueError, r"got \[6, 3\] and \[2, 4\]; pass both"),
        ({"critic_weight": None}, ValueError, r"a critic_weight \[V, 4\], got \[6, 2\] and none"),
        ({"dlogits": torch.ones(6, 2).half()}, TypeError, "dlogits must have the gradients' dtype"),
        ({"activation": "tanh"}, ValueError, "'none', 'relu' or 'gelu', got 'tanh'"),
    ],
)
def test_a_backward_that_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A forward that kept nothing, above all: its empty slope must not be read as a full one."""
    given: dict[str, Any] = {
        "dh": torch.ones(6, 4),
        "dlogits": torch.ones(6, 2),
        "critic_weight": torch.ones(2, 4),
        "gate": torch.ones(6, 4),
        "activation": "gelu",
    }
    with pytest.raises(error, match=message):
        torch.ops.lct.group_linear_backward(*{**given, **change}.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows, inputs and outputs >= 1 and classes >= 0, got 0, 1, 4, 2"),
        ({"outputs": -1}, "got 6, 1, -1, 2"),
        ({"classes": -1}, "got 6, 1, 4, -1"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_numbers_that_fit_no_tensor_are_refused(change: dict[str, int], message: str) -> None:
    native: Any = _native.load()
    sizes = {"rows": 6, "outputs": 4, "classes": 2, "threads": 1}
    with pytest.raises(ValueError, match=message):
        native.group_linear_backward_cpu_workspace(**{**sizes, **change})
    with pytest.raises(ValueError, match=message):
        native.group_linear_cpu_workspace(**{**sizes, "inputs": 1, "x_dtype": 0, **change})


def test_types_that_there_are_not_are_refused() -> None:
    native: Any = _native.load()
    for change, message in (
        ({"x_dtype": 3}, "x_dtype must be 0"),
        ({"activation": 3}, r"0 \(none\), 1 \(relu\) or 2"),
    ):
        names = ("dh", "dlogits", "critic_weight", "gate", "dpre", "dbias", "workspace")
        sizes = {"rows": 1, "outputs": 1, "classes": 0, "x_dtype": 0, "critic_dtype": 0, "activation": 0}
        with pytest.raises(ValueError, match=message):
            native.group_linear_backward_cpu(**dict.fromkeys(names, 0), **{**sizes, **change}, threads=1)


def test_workspace_is_bounded_in_rows() -> None:
    """Packed weights and a few blocks a thread; dbias is folded from a bounded number of chunks."""
    native: Any = _native.load()
    for inputs, outputs, classes in ((64, 64, 10), (1024, 1024, 63), (4096, 256, 0)):
        packed = 4 * (inputs + classes) * (outputs + 16)
        blocks = 3 * 2**20 + 4 * 96 * 80 * (outputs // 256 + 1)
        for rows in (10**6, 10**9):
            assert (
                native.group_linear_cpu_workspace(rows, inputs, outputs, classes, 0, 2)
                <= 2 * packed + 2 * blocks
            )
            assert native.group_linear_backward_cpu_workspace(
                rows, outputs, classes, 2
            ) <= 2 * packed + 2 * 2**20 + 4 * 257 * (outputs + 16)


def test_sizes_beyond_32_bits_are_counted_in_64() -> None:
    native: Any = _native.load()
    assert native.group_linear_cpu_workspace(1, 2**17, 2**16, 0, 0, 1) > 4 * 2**33
