"""The Triton kernels of critic_head, compiled for three generations of GPUs: what came out.

Needs no device.
"""

from typing import Any

import pytest

from tests.kernels.aot import OLDER, compile_tables

# All of a table costs half a minute: the whole of it where a spill would hurt most, else its ends.
RUNS = [
    ["90", "bf16"],
    ["--few", "90", "fp16", "fp32"],
    ["--few", "80", "bf16", "fp32"],
    ["--few", "100", "bf16"],
]
SHARED_MEMORY = 99 * 1024
# Of the one tile that small chips are refused; sm_80's limit.
SHARED_MEMORY_WIDE = 163 * 1024


@pytest.fixture(scope="module")
def built() -> list[dict[str, Any]]:
    """One row a compiled kernel."""
    rows = compile_tables("critic_head_aot", RUNS)
    assert {row["capability"] for row in rows} == {80, 90, 100}
    assert {row["kernel"] for row in rows} == {
        "_resident_kernel",
        "_tiled_kernel",
        "_wgrad_kernel",
        "_fold_kernel",
    }
    return rows


def test_nothing_spills(built: list[dict[str, Any]]) -> None:
    """But for the tile of 1,024 classes under triton before 3.9, whose compiler keeps less of it in registers."""
    spilled = [row for row in built if row["stack"] or row["registers"] > 255]
    assert [row for row in spilled if not (OLDER and row["tile"] == widest(row))] == []


def widest(row: dict[str, Any]) -> list[int]:
    return [16, 16, 1024, 16 if row["dtype"] == "fp32" else 8, 1]


def test_shared_memory_fits(built: list[dict[str, Any]]) -> None:
    for row in built:
        wide = row["dtype"] == "fp32" and row["kernel"] == "_tiled_kernel" and row["tile"][2] > 512
        assert row["shared"] <= (SHARED_MEMORY_WIDE if wide else SHARED_MEMORY), row


def test_half_types_run_on_tensor_cores(built: list[dict[str, Any]]) -> None:
    half = [row for row in built if row["needs_tensor_cores"]]
    assert len(half) > 20
    assert [row for row in half if not row["tensor_cores"]] == []
    # Each generation's own instruction somewhere; the small tiles stay with mma.
    for capability, own in ((80, "mma.sync"), (90, "wgmma"), (100, "tcgen05.mma")):
        assert any(own in row["tensor_cores"] for row in half if row["capability"] == capability), own


def test_fp32_is_fp32(built: list[dict[str, Any]]) -> None:
    assert any(row["dtype"] == "fp32" for row in built)
    assert [row for row in built if row["tf32"]] == []
    assert [row for row in built if row["dtype"] == "fp32" and row["tensor_cores"]] == []


def test_no_double_precision_and_no_atomics(built: list[dict[str, Any]]) -> None:
    assert [row for row in built if row["f64"] or row["atomics"]] == []
