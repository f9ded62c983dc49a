"""The command line: lct-fast = python -m lct_fast. Exit status 0 done, 1 a check failed, 2 a clear refusal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import lct_fast


def argument_parser() -> argparse.ArgumentParser:
    """Every command and its options."""
    from lct_fast.cli import bench, evaluate, export, info, plan, report, train

    parser = argparse.ArgumentParser(
        prog="lct-fast", description="Train networks cut into groups, without backward locking."
    )
    parser.add_argument("--version", action="version", version=lct_fast.__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (train, evaluate, export, bench, plan, report, info):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    from lct_fast.cli import processes
    from lct_fast.cli.config import ConfigError
    from lct_fast.engine import OutOfMemoryError, PeerError, ReplicaError
    from lct_fast.engine.transport import heartbeat
    from lct_fast.ops import BackendError

    args = argument_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError, OutOfMemoryError, PeerError, ReplicaError, BackendError) as error:
        heartbeat.report(error)
        if os.environ.get("LCT_TRACEBACK") == "1":
            raise
        # What is wrong with the options is wrong in every process; one says it.
        if processes.speaks(isinstance(error, ConfigError)):
            print(f"lct-fast {args.command}: {_one_line(error)}", file=sys.stderr, flush=True)
        return processes.refuse()
    except KeyboardInterrupt as error:
        processes.hear_no_more()
        heartbeat.report(error)
        if processes.is_first():
            print(
                f"lct-fast {args.command}: interrupted; a training run goes on with --resume", file=sys.stderr
            )
        return processes.refuse(130)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
