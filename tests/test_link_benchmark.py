"""One trial of `benchmarks.link`, tiny."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.link import CODECS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_tiny_run_of_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "link.json"
    command = [sys.executable, "-m", "benchmarks.link", "--tiny", "--samples", "1", "--steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(out), "--name", "a test's"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    found = report["codecs"]
    assert list(found) == list(CODECS) and report["link"] == "a test's" and report["tiny"] is True
    size = {codec: row["bytes_a_step"] for codec, row in found.items()}
    assert size["none"] == 2 * size["bf16"] and size["none"] / size["int4"] == pytest.approx(7.53, rel=0.01)
    for codec, row in found.items():
        assert len(row["seconds"]) == 1 and row["seconds_median"] > 0
        assert (row["chosen"] == codec) == (codec != "auto")
    auto = found["auto"]
    assert auto["chosen"] in auto["predicted_seconds"] and auto["chosen"] in auto["reason"]
    assert size["auto"] == pytest.approx(size[auto["chosen"]], rel=0.3)
