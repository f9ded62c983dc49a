"""The section of `benchmarks.gpu` that trains: local-critic, greedy and back-propagation of one network, on CIFAR-10.

All three train one epoch, then all three five, and so on: as long a schedule as the time allows, and the same for
each. A run that would not fit is not begun, and the finished ones stay.
"""

import shutil
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Run, command_of, result_of
from benchmarks.gpu.host import ROOT, environ, last_line
from benchmarks.gpu.sections import CUT, Context, SectionFailed, call

GROUPS = 4
EPOCHS = (1, 5, 20, 60)
METHODS = ("local-critic", "greedy", "backprop")
# LCT's net (a), as in benchmarks.accuracy but at its full width; critics are the data set's own, on 4x4 pooling.
ON_DEVICE = ("--model", "lct_vgg", "--device", "cuda", "--autocast", "bf16", "--channels-last")
ON_CPU = ("--data", "digits", "--device", "cpu", "--threads", "1", "--steps", "8")
# A run takes this much longer than the one before it foretells, at most.
SLACK = 1.15


def no_data(context: Context) -> str:
    """What to do where the section was given nothing to train on, or ""."""
    return "" if context.fake or context.data else "no images given; add --data cifar10:PATH"


def wrong_data(data: str) -> str:
    """Why these images cannot be trained on, or ""."""
    kind, _, path = data.partition(":")
    if kind not in ("cifar10", "cifar100", "images") or not path:
        return f"--data is cifar10:PATH, got '{data}'"
    return "" if Path(path).exists() else f"--data: {path} does not exist"


def plan(data: str, fake: bool = False) -> list[Run]:
    """Every run, in the order in which they are tried; with a fake device a few steps on digits."""
    common = ["--groups", str(GROUPS), "--seed", "0"]
    common += ON_CPU if fake else ("--data", data, *ON_DEVICE)
    return [
        Run(f"{method}-{epochs}", ["--method", method, *common, "--epochs", str(epochs)])
        for epochs in (EPOCHS[:1] if fake else EPOCHS)
        for method in METHODS
    ]


def cifar10(context: Context) -> dict[str, Any]:
    """Accuracy of every exit, seconds, and step times of each run that fits."""
    runs: list[dict[str, Any]] = []
    found: dict[str, Any] = {"runs": runs, "left_out": []}
    failed: dict[str, str] = {}
    wall: dict[str, tuple[float, float]] = {}
    for run in plan(context.data, context.fake):
        method, _, length = run.name.rpartition("-")
        epochs = int(length)
        if method in failed:
            continue
        needed = seconds_for(epochs, *wall[method]) if method in wall else 0.0
        if needed > context.left():
            found["left_out"].append(f"{run.name}: {needed:.0f} s needed, {context.left():.0f} s left")
            continue
        begin = context.left()
        status, said = train(run, context)
        if status == CUT:
            found["left_out"].append(f"{run.name}: cut after {begin:.0f} s")
        elif status:
            failed[method] = f"{run.name}: status {status}: {said}"
        else:
            runs.append(result_of(run, folder_of(run, context)))
            trained = runs[-1]["seconds"]
            wall[method] = begin - context.left() - trained, trained / epochs
    found["line"] = in_words(runs)
    if failed:
        raise SectionFailed("; ".join(failed.values()), found)
    missing = [name for name in METHODS if name not in wall]
    if missing:
        raise SectionFailed(f"no time for {', '.join(missing)}; give a larger --budget", found)
    return found


def train(run: Run, context: Context) -> tuple[int, str]:
    """One `lct-fast train`, from the start: its status, and its last words."""
    out = folder_of(run, context)
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = command_of(run, out)
    status, text = call(command, context, f"cifar10-{run.name}.log", environ(context), ROOT)
    # Weights are large, and nobody goes on from here.
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return status, last_line(text)


def folder_of(run: Run, context: Context) -> Path:
    """Where a run puts its records."""
    return context.out / "cifar10" / run.name


def seconds_for(epochs: int, fixed: float, each: float) -> float:
    """What a run will take: its start and end, and its epochs."""
    return fixed + SLACK * each * epochs


def in_words(runs: list[dict[str, Any]]) -> str:
    """Accuracy of the longest schedule that any finished."""
    longest = max((run["epochs"] for run in runs), default=0)
    said = [f"{run['method']} {run['test_accuracy']:.2%}" for run in runs if run["epochs"] == longest]
    return f"{longest} epochs: {', '.join(said)}" if said else "nothing finished"
