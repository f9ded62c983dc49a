"""The Triton kernels of vq, compiled for three generations of GPUs: what came out.

Needs no device.
"""

from typing import Any

import pytest

from tests.kernels.aot import compile_tables

RUNS = [
    ["90", "bf16"],
    ["--few", "90", "fp16", "fp32"],
    ["--few", "80", "bf16", "fp32"],
    ["--few", "100", "bf16"],
]
PRODUCTS = ("_search_kernel", "_sums_kernel")
SHARED_MEMORY = 200 * 1024
# Of the smaller sm_8x chips and sm_120, which take sm_80's tiles.
SHARED_MEMORY_SMALL = 99 * 1024

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    """One row a compiled kernel."""
    rows = compile_tables("vq_aot", RUNS)
    assert {row["capability"] for row in rows} == {80, 90, 100}
    assert {row["kernel"] for row in rows} == {
        "_words_kernel",
        "_search_kernel",
        "_pack_kernel",
        "_bucket_kernel",
        "_sums_kernel",
        "_error_kernel",
        "_fold_kernel",
        "_race_kernel",
        "_candidates_kernel",
    }
    return rows


def test_nothing_spills(built: list[dict[str, Any]]) -> None:
    assert [row for row in built if row["stack"] or row["registers"] > 255] == []


def test_two_searches_share_a_multiprocessor_of_sm_90(built: list[dict[str, Any]]) -> None:
    """65,536 registers and 227 KiB: one program's minimum runs beside the other's products."""
    rows = [row for row in built if row["kernel"] == "_search_kernel" and row["capability"] == 90]
    rows = [row for row in rows if row["dtype"] != "fp32" and row["constants"]["BLOCK_DEPTH"] <= 128]
    assert len(rows) > 10
    assert [row for row in rows if 2 * 32 * row["warps"] * row["registers"] > 65536] == []
    assert [row for row in rows if row["shared"] > 112 * 1024] == []


def test_shared_memory_fits(built: list[dict[str, Any]]) -> None:
    for row in built:
        assert row["shared"] <= (SHARED_MEMORY_SMALL if row["capability"] == 80 else SHARED_MEMORY), row


def test_products_run_on_tensor_cores(built: list[dict[str, Any]]) -> None:
    half = [row for row in built if row["kernel"] in PRODUCTS and row["dtype"] != "fp32"]
    assert len(half) > 20
    for row in half:
        own = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[row["capability"]]
        assert row["tensor_cores"] == [own], row


def test_fp32_is_fp32(built: list[dict[str, Any]]) -> None:
    assert any(row["dtype"] == "fp32" for row in built)
    assert [row for row in built if row["tf32"]] == []
    assert [row for row in built if row["dtype"] == "fp32" and row["tensor_cores"]] == []


def test_sums_leave_the_tensor_cores_after_every_step(built: list[dict[str, Any]]) -> None:
    """What is summed inside them is rounded towards zero: over a chunk that would be a bias."""
    half = [row for row in built if row["kernel"] == "_sums_kernel" and row["dtype"] != "fp32"]
    assert len(half) >= 5
    for row in half:
        sums = row["constants"]["WORDS"] * row["constants"]["BLOCK_DEPTH"] // (32 * row["warps"])
        assert row["subtractions"] >= sums, row


def test_no_double_precision_no_atomics_no_approximate_division(built: list[dict[str, Any]]) -> None:
    assert [row for row in built if row["f64"] or row["atomics"] or row["approximate_division"]] == []
