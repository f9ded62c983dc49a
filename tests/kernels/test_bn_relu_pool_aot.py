"""The Triton kernels of bn_relu_pool, compiled for three generations of GPUs: what came out.

Needs no device.
"""

from typing import Any

import pytest

from tests.kernels.aot import OLDER, compile_tables

RUNS = [["90", "bf16"], ["--few", "90", "fp16", "fp32"], ["--few", "80", "fp32"], ["--few", "100", "bf16"]]
SHARED_MEMORY = 8 * 1024

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    """One row a compiled kernel."""
    rows = compile_tables("bn_relu_pool_aot", RUNS)
    assert {row["capability"] for row in rows} == {80, 90, 100}
    assert {row["kernel"] for row in rows} == {
        "_statistics_kernel",
        "_fold_statistics_kernel",
        "_output_kernel",
        "_terms_kernel",
        "_fold_gradients_kernel",
        "_dx_kernel",
    }
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32"}
    return rows


def test_nothing_spills(built: list[dict[str, Any]]) -> None:
    """But for one fp32 tile under triton before 3.9, 8 bytes a thread at most."""
    allowed = {"fp32": 8} if OLDER else {}
    spilled = [row for row in built if row["stack"] > allowed.get(row["dtype"], 0) or row["registers"] > 255]
    assert spilled == []


def test_registers_leave_room_for_many_programs(built: list[dict[str, Any]]) -> None:
    """Bound by memory: half a multiprocessor's threads at least, where maps divide into whole vectors."""
    regular = [row for row in built if row["columns"] in (0, 16)]
    assert len(regular) > 80
    assert [row for row in regular if row["registers"] > 128] == []


def test_shared_memory_fits(built: list[dict[str, Any]]) -> None:
    assert [row for row in built if row["shared"] > SHARED_MEMORY] == []


def test_access_is_by_whole_vectors_where_maps_allow_it(built: list[dict[str, Any]]) -> None:
    wide = [
        row
        for row in built
        if (row["columns"] == 16 and row["tile"][1] >= 16 or row["channels_last"])
        and row["kernel"] != "_fold_statistics_kernel"
    ]
    assert len(wide) > 30
    assert [row for row in wide if row["widest"] < 16] == []


def test_no_double_precision_no_atomics_no_approximate_roots(built: list[dict[str, Any]]) -> None:
    assert [row for row in built if row["f64"] or row["atomics"] or row["approximate"]] == []
