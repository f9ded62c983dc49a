"""lct-fast info: what is installed, what can run here, and why the rest cannot."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from lct_fast import _native, ops
from lct_fast.bench.machine import commit, cpu_model, versions


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


def device_name(device: torch.device) -> str:
    """A device in words: the CPU's or the GPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {torch.get_num_threads()} threads"
