"""Drills: a small run over processes meets a fault at a seeded random moment, and must end, say why, and go on.

    python -m benchmarks.fault_drills --drills 20 --out benchmarks/results/fault_drills.json

Each drill checks that every process ended in time, that every survivor named the rank at fault, and that the run,
taken up again by torchrun's restart, by `--resume`, or by one process alone, ends with the weights, metrics and
evaluation of a run that nothing disturbed, bit for bit. The file is written after each drill; drills in it are not
run again. Times mean something on a quiet machine only.

kind      the fault, always in one process at random
kill      SIGKILL
stop      SIGSTOP; torchrun kills it after 30 s, for which only the first drill waits: in the others the drill does
cut       its connections to the other processes are shut down
full      its disk is full while it writes a checkpoint
flip      one bit of a packet changes on its way
damage    SIGKILL, and a bit or the end of the newest checkpoint is lost before the run goes on; where that is the only
          one, it must say that none is left
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.drill_worker import Fault, sealed
from lct_fast.bench.machine import commit, versions
from lct_fast.engine import checkpoint

KINDS = ("kill", "stop", "cut", "full", "flip", "damage")
# On every cut; vq has state at both ends and codebooks in its packets.
CODECS = ("none", "vq:64,4")
# Batches of the run, and after how many of them a checkpoint is begun.
STEPS, EVERY = 40, 4
# torchrun waits 30 s for a stopped process; the rest is for telling why.
MARGIN = 35.0
RUN = [
    *("--data", "digits", "--model", "digits_cnn:width=0.25", "--limit", "320", "--threads", "1"),
    *("--augment", "crop_flip", "--log-every", "2", "--checkpoint-every", str(EVERY), "--steps", str(STEPS)),
    *("--feedback-delay", "3", "--device", "cpu"),
]


@dataclass(frozen=True)
class Drill:
    """`how` the run goes on: torchrun's own "restart", "resume" under torchrun, or one process "alone"."""

    kind: str
    seed: int
    size: int
    rank: int
    batch: int
    delay: float
    how: str
    part: str
    codec: str

    @staticmethod
    def draw(kind: str, seed: int) -> Drill:
        """The drill of this seed."""
        chance = random.Random(f"{kind} {seed}")
        size = chance.randint(2, 4)
        # What a packet carries is checked by who gets it; a last group has nobody behind it.
        rank = chance.randrange(size - 1 if kind == "flip" else size)
        ways = ["resume", "alone"] if kind == "damage" else ["restart", "resume", "alone"]
        # A disk that fills after the last periodic checkpoint would be met by none.
        batch = chance.randint(0, STEPS - 2 * EVERY)
        part = chance.choice(("header", "body")) if sealed() else "header"
        delay, how, codec = chance.uniform(0, 0.03), chance.choice(ways), chance.choice(CODECS)
        return Drill(kind, seed, size, rank, batch, delay, how, part, codec)


class DrillError(Exception):
    """What went wrong in a drill."""


def torchrun(size: int, restarts: int, logs: Path, module: str, options: Sequence[str]) -> list[str]:
    """The command of a run over `size` processes, each with log files of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    logging = ["--log-dir", str(logs), "--redirects", "3", "--max-restarts", str(restarts)]
    return [*launcher, *logging, "-m", module, "train", *options]


def undisturbed(size: int, codec: str, folder: Path) -> Path:
    """The run in lockstep, which all others must equal."""
    run = folder / f"whole-{size}-{CODECS.index(codec)}"
    if not (run / "summary.json").exists():
        options = [*RUN, "--groups", str(size), "--codec", codec, "--schedule", "lockstep", "--out", str(run)]
        _checked([sys.executable, "-m", "lct_fast", "train", *options], "the undisturbed run")
    return run


def meet(drill: Drill, folder: Path, step_timeout: float, wait: bool) -> dict[str, Any]:
    """Runs the drill in `folder`; what it measured.

    Raises:
        DrillError: a check failed.
    """
    whole = undisturbed(drill.size, drill.codec, folder)
    run = folder / f"{drill.kind}-{drill.seed}"
    logs, note = run.with_suffix(".logs"), run.with_suffix(".fault")
    kind = "kill" if drill.kind == "damage" else drill.kind
    fault = Fault(kind, drill.rank, drill.batch, drill.delay, drill.seed, str(note), drill.part)
    timeouts = ["--start-timeout", "300", "--step-timeout", str(step_timeout)]
    options = [*RUN, "--groups", str(drill.size), "--codec", drill.codec, "--schedule", "pipelined"]
    options += [*timeouts, "--out", str(run)]
    restarts = int(drill.how == "restart")
    command = torchrun(drill.size, restarts, logs, "benchmarks.drill_worker", options)
    environment = os.environ | {"LCT_DRILL": json.dumps(asdict(fault))}
    launcher = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        measured = _watch(drill, launcher, logs, note, step_timeout, wait)
        said = launcher.communicate(timeout=600)[1]
    finally:
        launcher.kill()
    if restarts and launcher.returncode != 0:
        raise DrillError(f"the restarted run failed:\n{said[-2000:]}")
    _check_words(drill, _attempt(logs, 0))
    if not restarts:
        if launcher.returncode == 0:
            raise DrillError("the run ended as if nothing had happened")
        alone = len(list((run / "checkpoints").glob("step-*"))) == 1
        measured["damaged"] = _damage(drill, run) if drill.kind == "damage" else None
        measured["none_left"] = bool(measured["damaged"]) and alone
        if measured["none_left"]:
            _refused(options)
            return measured
        _go_on(drill, run, options, logs, measured["damaged"])
    difference = compare(run, whole)
    if difference:
        raise DrillError(f"the run that went on differs from the undisturbed one: {difference}")
    return measured


def compare(run: Path, whole: Path) -> str:
    """What differs, empty if nothing: weights and state of every group, metrics, evaluation."""
    ours, theirs = (_state(r) for r in (run, whole))
    if ours.keys() != theirs.keys():
        return f"tensors {sorted(ours.keys() ^ theirs.keys())}"
    odd = [n for n in ours if not torch.equal(ours[n], theirs[n])]
    if odd:
        return f"tensors {odd}"
    if _metrics(run) != _metrics(whole):
        return "metrics.jsonl"
    for key in ("test_accuracy", "exit_test_accuracy", "steps", "wire_bytes_per_sample"):
        a, b = (json.loads((r / "summary.json").read_text())[key] for r in (run, whole))
        if a != b:
            return f"{key} {a}, expected {b}"
    return ""


def _watch(
    drill: Drill, launcher: subprocess.Popen[str], logs: Path, note: Path, step_timeout: float, wait: bool
) -> dict[str, Any]:
    """Sees the processes of the first attempt end."""
    deadline = time.monotonic() + 300
    while not note.exists():
        if time.monotonic() > deadline or launcher.poll() is not None:
            raise DrillError(f"the fault never struck:\n{_tail(_attempt(logs, 0))}")
        time.sleep(0.02)
    struck = json.loads(note.read_text())["at"]
    pids = _pids(_attempt(logs, 0))
    if len(pids) != drill.size:
        raise DrillError(f"expected the map of {drill.size} processes, found {pids}")
    ends: dict[int, float] = {}
    while len(ends) < drill.size:
        for rank, pid in pids.items():
            if rank not in ends and not _lives(pid):
                ends[rank] = time.time() - struck
        if time.time() - struck > step_timeout + MARGIN + 10:
            raise DrillError(f"ranks {sorted(set(pids) - set(ends))} are still there after {MARGIN} s more")
        if drill.kind == "stop" and not wait and len(ends) == drill.size - 1 and drill.rank not in ends:
            os.kill(pids[drill.rank], signal.SIGKILL)
        time.sleep(0.05)
    survivors = [seconds for rank, seconds in ends.items() if rank != drill.rank]
    if max(ends.values()) > step_timeout + MARGIN:
        raise DrillError(f"the last process ended {max(ends.values()):.1f} s after the fault")
    return {"survivors_seconds": round(max(survivors), 2), "all_seconds": round(max(ends.values()), 2)}


def _check_words(drill: Drill, attempt: Path) -> None:
    """Every process that can speak says what was wrong, and names the rank at fault unless it is that one."""
    # A damaged packet is found by who gets it.
    named = drill.rank + 1 if drill.kind == "flip" else drill.rank
    silent = {drill.rank} if drill.kind in ("kill", "stop", "damage") else set()
    what = {"full": "could not be written (No space left on device)", "flip": "packet"}.get(drill.kind, "")
    for rank in set(range(drill.size)) - silent:
        said = _lines(attempt / str(rank) / "stderr.log")
        own = rank == named and bool(what)
        if not any((own or f"rank {named} (group {named + 1}," in line) and what in line for line in said):
            raise DrillError(
                f"rank {rank} did not say that rank {named} is at fault ({what or 'lost'}): {said}"
            )


def _damage(drill: Drill, run: Path) -> str:
    """Takes a bit, or the second half, of a file of the newest checkpoint; which, or "" if there is none."""
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        return ""
    chance = random.Random(f"damage {drill.seed}")
    file = chance.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if chance.random() < 0.5:
        del content[len(content) // 2 :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"{newest.name}/{file.name}"


def _go_on(drill: Drill, run: Path, options: list[str], logs: Path, damaged: str | None) -> None:
    """Resumes the run, over processes or in one."""
    if drill.how == "alone":
        alone = [*options, "--resume"]
        alone[alone.index("pipelined")] = "lockstep"
        said = _checked([sys.executable, "-m", "lct_fast", "train", *alone], "the run resumed in one process")
    else:
        again = logs.with_suffix(".again")
        command = torchrun(drill.size, 0, again, "lct_fast", [*options, "--resume"])
        _checked(command, "the resumed run")
        said = "\n".join(_lines(_attempt(again, 0) / "0" / "stderr.log"))
    if damaged and f"{damaged.partition('/')[0]} is passed over" not in said:
        raise DrillError(f"nothing was said of {damaged}: {said[-500:]}")


def _refused(options: list[str]) -> None:
    """Resumes the run in one process, where no checkpoint is whole."""
    alone = [sys.executable, "-m", "lct_fast", "train", *options, "--resume"]
    alone[alone.index("pipelined")] = "lockstep"
    done = subprocess.run(alone, capture_output=True, text=True, timeout=600)
    if done.returncode != 2 or "holds no whole checkpoint: start again" not in done.stderr:
        raise DrillError(f"without a checkpoint it went on, or did not say why not: {done.stderr[-500:]}")


def _checked(command: Sequence[str], what: str) -> str:
    done = subprocess.run(list(command), capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise DrillError(f"{what} failed:\n{done.stderr[-2000:]}")
    return done.stderr


def _attempt(logs: Path, number: int) -> Path:
    """The folder of logs of an attempt: RUN_ID/attempt_N."""
    found = sorted(logs.glob(f"*/attempt_{number}"))
    return found[0] if found else logs


def _lines(log: Path) -> list[str]:
    """What a process said of its end."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return [s for s in re.split(r"[\r\n]+", text) if "lct-fast train: " in s or "lct_fast: " in s]


def _tail(attempt: Path) -> str:
    logs = sorted(attempt.glob("*/stderr.log"))
    return "\n".join(f"{log.parent.name}: {log.read_text(errors='replace')[-600:]}" for log in logs)


def _pids(attempt: Path) -> dict[int, int]:
    """Rank to process id, as rank 0 prints them."""
    text = (attempt / "0" / "stdout.log").read_text()
    return {int(r): int(p) for r, p in re.findall(r"on rank (\d+): .*process (\d+)", text)}


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _state(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.latest(run / "checkpoints")
    if path is None:
        raise DrillError(f"{run} has no checkpoint")
    files = sorted(path.glob("group-*.safetensors"))
    return {f"{f.stem}:{n}": t for f in files for n, t in load_file(f).items()}


def _metrics(run: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "samples_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def summary(drills: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per kind: drills, how many passed, seconds from the fault to the end of the survivors."""
    kinds: dict[str, Any] = {}
    for kind in KINDS:
        mine = [d for d in drills if d["kind"] == kind]
        seconds = [d["survivors_seconds"] for d in mine if d["passed"]]
        if mine:
            kinds[kind] = {
                "drills": len(mine),
                "passed": sum(d["passed"] for d in mine),
                "survivors_seconds_median": median(seconds) if seconds else None,
                "survivors_seconds_max": max(seconds, default=None),
            }
    return kinds


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the drills that the file does not hold yet; 0 if all in it passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--drills", type=int, default=20, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seed", type=int, default=0, help="of the first drill of each kind")
    parser.add_argument("--step-timeout", type=float, default=5.0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    found = json.loads(args.out.read_text())["drills"] if args.out.exists() else []
    known = {(d["kind"], d["seed"]) for d in found}
    seeds = range(args.seed, args.seed + args.drills)
    wanted = [Drill.draw(kind, seed) for seed in seeds for kind in args.kinds]
    missing = [d for d in wanted if (d.kind, d.seed) not in known]
    with tempfile.TemporaryDirectory() as folder:
        for drill in tqdm(missing, unit="drill"):
            start = time.monotonic()
            record: dict[str, Any] = asdict(drill) | {
                "passed": True,
                "error": "",
                "step_timeout": args.step_timeout,
                "commit": commit(),
            }
            try:
                record |= meet(drill, Path(folder), args.step_timeout, wait=drill.seed == args.seed)
            except (DrillError, subprocess.TimeoutExpired) as error:
                record |= {"passed": False, "error": str(error)}
                tqdm.write(f"{drill}: {error}")
            record["seconds"] = round(time.monotonic() - start, 1)
            found.append(record)
            _store(args.out, found)
    for kind, line in summary(found).items():
        print(f"{kind:7} {line}")
    return 0 if all(d["passed"] for d in found) else 1


def _store(out: Path, drills: list[dict[str, Any]]) -> None:
    """Whole or not at all."""
    record = {
        "command": "python -m benchmarks.fault_drills",
        "run": " ".join(RUN),
        "packets_have_checksums": sealed(),
        "kinds": summary(drills),
        "versions": versions(),
        "drills": drills,
    }
    partial = out.with_suffix(".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, out)


if __name__ == "__main__":
    sys.exit(main())
