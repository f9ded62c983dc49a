"""The Triton kernels of group_linear, compiled for three generations of GPUs: what came out.

Needs no device.
"""

from typing import Any

import pytest

from tests.kernels.aot import OLDER, compile_tables

# All of a table where a spill would hurt most, else the launches with the most classes.
RUNS = [
    ["90", "bf16"],
    ["--few", "90", "fp16", "fp32"],
    ["--few", "80", "bf16", "fp32"],
    ["--few", "100", "bf16", "fp32"],
]
SHARED_MEMORY = 99 * 1024

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    """One row a compiled kernel."""
    rows = compile_tables("group_linear_aot", RUNS)
    assert {row["capability"] for row in rows} == {80, 90, 100}
    assert {row["kernel"] for row in rows} == {"_forward_kernel", "_backward_kernel", "_fold_kernel"}
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    return rows


def test_nothing_spills(built: list[dict[str, Any]]) -> None:
    """But for some tiles under triton before 3.9, 128 bytes a thread at most."""
    allowed = 128 if OLDER else 0
    spilled = [row for row in built if row["stack"] > allowed or row["registers"] > 255]
    assert spilled == []


def test_two_programs_fit_a_multiprocessor_or_one_has_all_its_warps(built: list[dict[str, Any]]) -> None:
    """64 K registers: with 8 warps a program may take 255 of them, with 4 two programs fit at the least."""
    assert [row for row in built if row["registers"] * row["tile"][-2] * 32 > 2**16] == []


def test_shared_memory_fits(built: list[dict[str, Any]]) -> None:
    assert [row for row in built if row["shared"] > SHARED_MEMORY] == []


def test_products_of_half_types_run_on_tensor_cores(built: list[dict[str, Any]]) -> None:
    """On each generation's own instruction, which from sm_90 on takes 64 rows."""
    own = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
    products = [
        row
        for row in built
        if row["dtype"] != "fp32" and (row["kernel"] == "_forward_kernel" or row["classes"])
    ]
    assert len(products) > 20
    assert [row for row in products if not row["tensor_cores"]] == []
    tall = [row for row in products if row["tile"][0] >= 64]
    assert tall and [row for row in tall if own[row["capability"]] not in row["tensor_cores"]] == []


def test_tiles_of_x_and_weight_are_loaded_while_others_are_multiplied(built: list[dict[str, Any]]) -> None:
    forward = [row for row in built if row["kernel"] == "_forward_kernel" and row["even"]]
    assert forward and [row for row in forward if not row["asynchronous"]] == []


def test_fp32_is_fp32(built: list[dict[str, Any]]) -> None:
    assert [row for row in built if row["tf32"]] == []
    assert [row for row in built if row["dtype"] == "fp32" and row["tensor_cores"]] == []


def test_no_double_precision_and_no_atomics(built: list[dict[str, Any]]) -> None:
    assert [row for row in built if row["f64"] or row["atomics"]] == []
