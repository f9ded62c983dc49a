"""No backend reads or writes outside its tensors: they lie against pages that fault."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ladder import PLACES, Place

ROOT = Path(__file__).parents[2]


def exercise(place: Place, *options: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: a stray access ends it.
    return subprocess.run(
        [sys.executable, *options, "-m", "tests.ops.critic_head_exercise", place.backend, place.device],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("where", [p for p in PLACES if p.backend != "reference"], ids=str)
def test_nothing_outside_the_tensors_is_touched(where: Place) -> None:
    done = exercise(where)
    assert done.returncode == 0, f"status {done.returncode} after {done.stdout[-200:]}\n{done.stderr[-3000:]}"
    assert "after (130, 64, 17) f32-bf16 without row_scale" in done.stdout
    if where.device == "cpu":
        assert "before (19, 7, 100) bf16 without row_scale" in done.stdout
