"""Damaged packets and checkpoints; 10,000 of each: ``python -m tests.engine.fuzz_packets`` and ``fuzz_checkpoints``."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import fuzz_checkpoints, fuzz_packets

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native module built under AddressSanitizer."""
    folder = tmp_path_factory.mktemp("sanitized")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "lct_fast").mkdir()
    shutil.copy(ROOT / "lct_fast" / "__init__.py", folder / "lct_fast")
    flags = {"CXXFLAGS": "-fsanitize=address -O0", "LDFLAGS": "-fsanitize=address"}
    environment = os.environ | flags | {"LCT_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "out")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "out" / "lct_fast").glob("_C*.so")
    return built


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_damaged_packets_are_refused_by_name_or_decoded(sanitized: Path) -> None:
    # The C++ library too, as the sanitizer looks for what throws exceptions when it is loaded.
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for n in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.engine.fuzz_packets", "--count", "1500", "--seed", "3"]
    done = subprocess.run(
        [*command, "--native", str(sanitized)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ends = {line.strip().partition("  ")[2]: int(line.split()[0]) for line in done.stdout.splitlines()}
    assert sum(ends.values()) == 1500
    # It reached the codecs, and they refused as well as decoded.
    assert ends["decoded"] > 100 and ends["refused by the codec"] > 30 and ends["packet size:"] > 30


def test_what_is_not_a_refusal_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, encoded: object) -> None:
        raise IndexError("out of bounds")

    monkeypatch.setattr("lct_fast.codecs.TopK.decode", broken)
    with pytest.raises((AssertionError, IndexError), match="out of bounds"):
        fuzz_packets.run(40, 0)


def test_damaged_checkpoints_are_refused_by_name_or_loaded() -> None:
    ends = fuzz_checkpoints.run(150, 7)
    assert ends["refused"] > 60 and ends["loaded"] > 5
    assert sum(ends.values()) == 150
