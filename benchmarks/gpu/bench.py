"""Sections of `benchmarks.gpu` that take times: a section a stem of ops, and groups on streams of one device."""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu.host import ROOT, environ, last_line, tool
from benchmarks.gpu.sections import CUT, Context, SectionFailed, call
from lct_fast.bench.cases import by_stem
from lct_fast.bench.report import best_rival

# Profiles of a section, and the seconds without which one is not begun.
PROFILED = 3
PROFILE_LEAST_S = 30.0
# Of a section's time; no shape is begun that would not fit, but none is interrupted either.
MEASURING_SHARE = 0.75
# Of the section of streams: most of its time goes into compilation, of every group of every contender.
SAMPLING_SHARE = 0.3
# At most: the decoupled step over the plain one, and shares of a step.
OVERLAP_AIMS = {"against_plain": 1.15, "exposed_copy": 0.03, "launch_gaps": 0.05}


def bench(stem: str) -> Callable[[Context], dict[str, Any]]:
    """A section that times the ops of a stem beside torch and the rivals that are installed."""

    def run(context: Context) -> dict[str, Any]:
        out = context.out / f"bench-{stem}.json"
        out.unlink(missing_ok=True)
        command = [sys.executable, "-m", "lct_fast.cli.bench", *(each.name for each in by_stem()[stem])]
        command += ["--out", str(out), "--budget", f"{MEASURING_SHARE * context.left():.0f}"]
        if context.fake:
            command += ["--device", "cpu", "--backend", "cpu", "--trial"]
        else:
            command += ["--device", "cuda", "--rivals"]
        status, text = call(command, context, f"bench-{stem}.log", environ(context), ROOT)
        # Written after every shape, so a command that is cut has told something.
        found: dict[str, Any] = {"report": json.loads(out.read_text()) if out.exists() else {}}
        missed = misses(found["report"].get("rows", []))
        found["missed"] = [f"{row['op']} {row['shape']}: {best_rival(row):.2f}x" for row in missed]
        left_out = len(found["report"].get("left_out", []))
        found["line"] = f"{last_line(text)}; {len(missed)} aims missed, {left_out} shapes left out"
        if status == CUT:
            count = len(found["report"].get("rows", []))
            raise SectionFailed(f"cut after {count} rows; give a larger --budget", found)
        if status:
            raise SectionFailed(f"status {status}: {last_line(text)}", found)
        found["profiles"] = [] if context.fake else [profile(row, context) for row in missed[:PROFILED]]
        return found

    return run


def aim(op: str, sizes: dict[str, Any]) -> float | None:
    """How many times as fast as the best rival an op should be; None where any figure will do."""
    if op == "vq_encode":
        return 2.0 if sizes["codewords"] <= 256 else 1.3
    if op == "critic_head":
        return 1.5 if sizes["classes"] <= 128 else 1.0
    return 1.3 if op == "bn_relu_pool_critic_head" else None


def best_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of the best backend of every op and shape that has a rival.

    Where a backend was timed with graphs and without, the row counts in which it does worse: a rival that no graph
    captures is in the second alone.
    """
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["op"], row["shape"], row["backend"]
        rival = best_rival(row)
        if rival is not None and (key not in worst or rival < (best_rival(worst[key]) or 0.0)):
            worst[key] = row
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for (op, shape, _), row in worst.items():
        if (op, shape) not in best or (best_rival(row) or 0.0) > (best_rival(best[op, shape]) or 0.0):
            best[op, shape] = row
    return list(best.values())


def misses(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best rows that do not reach their aim."""
    wanted = ((row, aim(row["op"], row["sizes"])) for row in best_rows(rows))
    return [row for row, least in wanted if least is not None and (best_rival(row) or 0.0) < least]


def profile(row: dict[str, Any], context: Context) -> dict[str, Any]:
    """Bytes, occupancy and stalls of a row's kernels, where ncu exists and may read the counters."""
    program = tool("ncu")
    if program is None or context.left() < PROFILE_LEAST_S:
        return {"shape": row["shape"], "said": "ncu is not installed" if program is None else "no time left"}
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
    # The device's clocks are left as they are.
    command = [program, "--profile-from-start", "off", "--clock-control", "none", "--csv"]
    command += [f"--section={name}" for name in sections]
    command += [sys.executable, "-m", "benchmarks.profile_once", row["op"], row["shape"], row["backend"]]
    log = f"ncu-{row['op']}-{row['shape']}-{row['backend']}.csv"
    status, text = call(command, context, log, environ(context), ROOT)
    return {"shape": row["shape"], "status": status, "log": log, "said": last_line(text)}


def overlap(context: Context) -> dict[str, Any]:
    """Times groups on streams of this device beside the compiled plain step."""
    folder = context.out / "overlap"
    out = folder / "overlap.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.overlap", "--out", str(folder)]
    command += ["--budget", f"{SAMPLING_SHARE * context.left():.0f}", *(["--trial"] if context.fake else [])]
    status, text = call(command, context, "overlap.log", environ(context), ROOT)
    found: dict[str, Any] = {"report": json.loads(out.read_text()) if out.exists() else {}}
    found["line"] = last_line(text)
    if status == CUT:
        count = len(found["report"].get("rows", []))
        raise SectionFailed(f"cut after {count} numbers of groups; give a larger --budget", found)
    if status:
        raise SectionFailed(f"status {status}: {found['line']}", found)
    found["missed"] = [
        f"{row['groups']} groups, {name}: {row[name]}, aim {most}"
        for row in found["report"]["rows"]
        for name, most in OVERLAP_AIMS.items()
        if row[name] is None or row[name] > most
    ]
    return found
