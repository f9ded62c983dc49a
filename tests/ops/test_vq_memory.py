"""No backend of vq reads or writes outside its tensors, and the workspace does not grow with rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lct_fast import _native
from tests.ladder import Place
from tests.ops.vq_case import ENCODE_PLACES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("where", [p for p in ENCODE_PLACES if p.backend != "reference"], ids=str)
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", "avx512vnni"])
def test_nothing_outside_the_tensors_is_touched(where: Place, level: str) -> None:
    native = _native.load()
    assert native is not None, _native.why_absent()
    if level not in native.simd_levels():
        pytest.skip(f"this CPU has no {level}")
    if where.backend != "cpu" and level != "scalar":
        pytest.skip("instruction sets are the cpu backend's")
    # In a process of its own: a stray access ends it.
    code = (
        f"from lct_fast import _native; _native.load().set_simd({level!r})\n"
        f"from tests.ops.vq_exercise import main; main({where.backend!r}, {where.device!r}, False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"status {done.returncode} after {done.stdout[-200:]}\n{done.stderr[-3000:]}"
    last = "(67, 2, 13, 130, 5) f16"
    assert last in done.stdout.splitlines()[-1]


def test_workspace_is_bounded_in_rows() -> None:
    native = _native.load()
    assert native is not None, _native.why_absent()
    size = native.vq_encode_cpu_workspace
    for groups, codewords, depth in ((1, 256, 4), (1, 1024, 64), (8, 257, 9), (1, 65536, 16)):
        words = 4 * groups * (codewords + 6) * (depth + 4)
        for threads in (1, 2, 8):
            for rows in (10**6, 10**12):
                bytes_ = size(rows, groups, codewords, depth, 16, 0, threads)
                # Panels, the filter's, chunk, total and padded words; for each thread two places with two copies
                # each, and scratch, of which 64 rows' smallest scores in every tile of six words are the most.
                tiles = 4 * groups * 64 * (codewords + 48) / 6
                assert bytes_ <= (6 + 5 * threads) * words + threads * (tiles + 2**17), (codewords, threads)


def test_sizes_beyond_32_bits_are_counted_in_64() -> None:
    native = _native.load()
    assert native is not None, _native.why_absent()
    assert native.vq_encode_cpu_workspace(1, 2**11, 2**16, 2**8, 0, 0, 1) > 4 * 2**35
