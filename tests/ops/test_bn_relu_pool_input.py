"""Input that does not fit is refused, eagerly and when traced: what was expected, what came, what to do."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lct_fast import _native, ops

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of 3 dimensions": ({"x": torch.ones(3, 4, 6)}, ValueError, r"\[N, C, H, W\], got \[3, 4, 6\]; use"),
    "x without channels": ({"x": torch.ones(2, 0, 4, 6)}, ValueError, "at least one channel"),
    "x without rows": ({"x": torch.ones(2, 3, 0, 6)}, ValueError, r"at least one.*got \[2, 3, 0, 6\]"),
    "x of integers": (
        {"x": torch.ones(2, 3, 4, 6).int()},
        TypeError,
        "x must be float32.*got torch.int32; cast",
    ),
    "gamma too long": ({"gamma": torch.ones(4)}, ValueError, r"gamma must be \[3\] to fit x.*got \[4\]"),
    "beta of 2 dimensions": ({"beta": torch.ones(3, 1)}, ValueError, r"beta must be \[3\].*got \[3, 1\]"),
    "gamma of integers": (
        {"gamma": torch.ones(3).long()},
        TypeError,
        "gamma must be float32.*got torch.int64",
    ),
    "pool of zero": ({"pool": 0}, ValueError, "pool must divide both sides of the map 4 x 6, got 0"),
    "pool beside the height": ({"pool": 3}, ValueError, "map 4 x 6, got 3; elsewhere use torch's"),
    "pool beside the width": ({"pool": 4}, ValueError, "map 4 x 6, got 4"),
    "one value a channel": (
        {"x": torch.ones(1, 3, 1, 1), "pool": 1},
        ValueError,
        r"more than 1 value per channel, got x \[1, 3, 1, 1\]; use a larger batch",
    ),
    "one running statistic": ({"running_var": None}, ValueError, "go together, got only one; pass both"),
    "running_mean too short": (
        {"running_mean": torch.ones(2), "training": False},
        ValueError,
        r"given_mean must be \[3\].*got \[2\]",
    ),
    "gamma on another device": (
        {"gamma": torch.ones(3, device="meta")},
        ValueError,
        "gamma is on meta and x on cpu; move it",
    ),
}


def arguments(**change: Any) -> dict[str, Any]:
    given = {"x": torch.ones(2, 3, 4, 6), "pool": 2}
    given |= {name: torch.ones(3) for name in ("gamma", "beta", "running_mean", "running_var")}
    return {**given, **change}


@pytest.mark.parametrize("what", WRONG)
def test_refused(what: str) -> None:
    change, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        ops.bn_relu_pool(**arguments(**change))


@pytest.mark.parametrize("what", [what for what in WRONG if "device" not in what])
def test_refused_when_traced(what: str) -> None:
    change, error, message = WRONG[what]
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments(**change).items()
        }
        with pytest.raises(error, match=message):
            ops.bn_relu_pool(**fake)


def test_one_value_a_channel_is_fine_in_evaluation() -> None:
    out = ops.bn_relu_pool(**arguments(x=torch.full((1, 3, 1, 1), 3.0), pool=1, training=False))
    torch.testing.assert_close(out.y, torch.full((1, 3, 1, 1), 3.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples, channels, height and width >= 1, got 0"),
        ({"width": -1}, "got 2, 3, 4, -1"),
        ({"pool": 3}, "divides height and width, got 2, 3, 4, 6, pool 3"),
        ({"pool": 0}, "pool 0"),
        ({"dtype": 3}, "dtype must be 0"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_numbers_that_fit_no_tensor_are_refused(change: dict[str, int], message: str) -> None:
    native: Any = _native.load()
    sizes = {"samples": 2, "channels": 3, "height": 4, "width": 6, "pool": 2, "channels_last": 0, "dtype": 0}
    for call, more in (
        ("bn_relu_pool_cpu_workspace", {}),
        ("bn_relu_pool_backward_cpu_workspace", {"with_dy": 1}),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(native, call)(**{**sizes, **more, "threads": 1, **change})


@pytest.mark.parametrize("channels_last", [False, True])
def test_workspace_is_a_small_share_of_x(channels_last: bool) -> None:
    native: Any = _native.load()
    for shape in ((128, 64, 32, 32, 2), (1024, 512, 8, 8, 2), (32, 64, 224, 224, 1)):
        x = 4 * shape[0] * shape[1] * shape[2] * shape[3]
        slots = 2 * 2**20
        assert native.bn_relu_pool_cpu_workspace(*shape, channels_last, 0, 2) < x / 10 + slots
        assert (
            native.bn_relu_pool_backward_cpu_workspace(*shape, channels_last, 0, False, 2) < x / 100 + 2**16
        )


def test_sizes_beyond_32_bits_are_counted_in_64() -> None:
    native: Any = _native.load()
    assert native.bn_relu_pool_cpu_workspace(2**20, 2**10, 64, 64, 1, 0, 0, 1) > 2**33
