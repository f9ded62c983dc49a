"""lct-fast info: what is installed, what can run here, and why the rest cannot."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lct_fast
from lct_fast import _native, ops


def add_parser(subparsers: Any) -> None:
    """Registers ``info``."""
    parser = subparsers.add_parser("info", help="versions, devices, backends and build flags")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs ``info``."""
    facts = gather()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print("versions   " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()))
    print("devices    " + "; ".join(facts["devices"]))
    native = facts["native"]
    print(
        "native     "
        + (
            ", ".join(f"{k}: {v}" for k, v in native["build"].items())
            if native["build"]
            else native["absent"]
        )
    )
    for op, backends in facts["backends"].items():
        print(op)
        for name, state in backends.items():
            print(f"  {name:<10} {state}")
    return 0


def gather() -> dict[str, Any]:
    """Everything ``info`` prints."""
    module = _native.load()
    return {
        "versions": versions(),
        "commit": commit(),
        "devices": [device_name(torch.device("cpu"))]
        + [device_name(torch.device("cuda", i)) for i in range(torch.cuda.device_count())],
        "native": {"build": module.build_info() if module else None, "absent": _native.why_absent()},
        "backends": {name: ops.backends(name) for name in ops.names()},
    }


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


def device_name(device: torch.device) -> str:
    """A device in words: the CPU's or the GPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


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
