"""What a measurement ran on: hardware, versions, commit, and what other programs took of the machine meanwhile."""

import os
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lct_fast
from lct_fast import _native

# Of the machine's CPU time. With more in other hands, times say little.
FOREIGN = 0.05


def versions() -> dict[str, str]:
    """Versions of this package, Python and what it stands on."""
    found = {
        "lct_fast": lct_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str | None:
    """The git commit of the source tree this package runs from, "+" appended when it has changes; else None."""
    root = Path(lct_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=root, capture_output=True, text=True
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def cpu_model() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def header(device: str) -> dict[str, Any]:
    """What every report begins with."""
    native = _native.load()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.simd_levels()[-1] if native else None,
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "versions": versions() | ({"compiler": native.build_info()["compiler"]} if native else {}),
        "commit": commit(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["versions"]["cuda"] = torch.version.cuda
    return found


def preempted() -> int:
    """How often the system has taken a core away from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def busy_seconds() -> float:
    """CPU time that the whole system has spent, steal included."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Adds up, over the blocks it surrounds, what other programs took of the machine."""

    def __init__(self) -> None:
        self._foreign = self._elapsed = 0.0

    def __enter__(self) -> None:
        self._since = busy_seconds(), sum(os.times()[:4]), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        busy, own, begun = self._since
        self._elapsed += time.perf_counter() - begun
        self._foreign += busy_seconds() - busy - (sum(os.times()[:4]) - own)

    @property
    def foreign_cpu_share(self) -> float:
        """Of all cores' time, 0 to 1."""
        return max(self._foreign, 0.0) / self._elapsed / (os.cpu_count() or 1) if self._elapsed else 0.0
