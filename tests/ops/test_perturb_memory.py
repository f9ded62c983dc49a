"""No backend reads or writes outside its tensors: they lie against pages that fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ladder import Place
from tests.ops.perturb_case import PLACES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("where", [p for p in PLACES if p.backend != "reference"], ids=str)
def test_nothing_outside_the_tensors_is_touched(where: Place) -> None:
    # In a process of its own: a stray access ends it.
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.perturb_exercise", where.backend, where.device],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"status {done.returncode} after {done.stdout[-200:]}\n{done.stderr[-3000:]}"
    assert "after (8, 33, 67) 2 bf16" in done.stdout
    if where.device == "cpu":
        assert "before (8, 33, 67) 2 bf16" in done.stdout
