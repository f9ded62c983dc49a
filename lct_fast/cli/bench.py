"""lct-fast bench: the ops here and now, beside plain torch and other packages."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import _SubParsersAction

BACKENDS = ("reference", "cpu", "triton", "cuda")
SAMPLES = {"cpu": 15, "cuda": 50}


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers ``bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="time the ops, beside plain torch and other packages",
        description="Time ops beside plain torch, eager and compiled, in one process and in turns: percentiles, "
        "share of a roofline measured in the same run, memory. Every output is checked against float64 first; a "
        "contender that fails gets no time, and the exit status is 1. THP_MEM_ALLOC_ENABLE=0 in the "
        "environment leaves out the 2 MB pages that all contenders get for large tensors on the CPU.",
    )
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help="such as critic_head, or vq for all of vq's (default: every op)"
    )
    parser.add_argument("--rivals", action="store_true", help="also other packages, those that are installed")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME",
        help="only rivals with this in their name, such as faiss; repeat for more (default: all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, help="of every contender on the CPU (default: torch's)")
    parser.add_argument(
        "--samples", type=int, help="of each contender and shape (default: 15 on the CPU, 50 on a device)"
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        help="instead of the op's own shapes; a wrong one says the form",
    )
    parser.add_argument(
        "--trial",
        action="store_true",
        help="a tiny shape of each op, nothing compiled, to see that it works; times then mean nothing",
    )
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        choices=BACKENDS,
        help="of ours (default: every kernel that runs here; `reference` only if named)",
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="S", help="leave out shapes that would exceed it"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the report, after every shape")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs ``bench``."""
    # Torch reads it at its first allocation. It helps torch most.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # The profiler, which counts memory, announces itself on every other level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    import torch

    from lct_fast.bench import cases, report
    from lct_fast.bench.case import Place

    if args.trial and args.shape:
        raise ValueError("--trial has shapes of its own; leave out --shape, or --trial")
    least = report.LEAST_SAMPLES[args.device]
    usual = least if args.trial else SAMPLES[args.device]
    samples = usual if args.samples is None else args.samples
    if samples < least:
        raise ValueError(
            f"--samples must be at least {least} on {args.device} to say anything, got {samples}"
        )
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device, or a torch without CUDA; `lct-fast info` says which")
    if args.out and args.out.is_dir():
        raise ValueError(f"--out must be a file to write, got the folder {args.out}")
    plan = report.Plan(
        benches=cases.find(args.ops),
        place=Place(
            args.device, tuple(args.backend), args.rivals, tuple(args.against), compiled=not args.trial
        ),
        samples=samples,
        shapes=tuple(args.shape),
        budget_s=args.budget,
        out=args.out,
        trial=args.trial,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        found = report.run(plan, _nothing if args.json else _say)
    finally:
        torch.set_num_threads(before)
    for text in (*found["missing_rivals"], *(f"left out: {each}" for each in found["left_out"])):
        print(f"lct-fast bench: {text}", file=sys.stderr)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        if not found["quiet"]:
            print(f"not quiet: other programs used {found['foreign_cpu_share']:.0%} of the machine")
        print(report.conclusion(found["rows"]))
    return 1 if found["failed_checks"] else 0


def _say(text: str) -> None:
    print(text, flush=True)


def _nothing(text: str) -> None:
    pass


def main() -> int:
    """The command without the packages that other commands need: a GPU machine may have little more than torch."""
    parser = argparse.ArgumentParser(prog="python -m lct_fast.cli.bench")
    add_parser(parser.add_subparsers())
    sys.argv.insert(1, "bench")
    args = parser.parse_args()
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"lct-fast bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
