"""lct-fast train: a run from options to summary, resumable."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from lct_fast.bench.machine import commit, versions
from lct_fast.cli import build, loop, processes
from lct_fast.cli.config import Config, add_arguments, given, resolve
from lct_fast.cli.info import device_name
from lct_fast.cli.recorder import Recorder
from lct_fast.cli.run_folder import RunFolder
from lct_fast.engine import Trainer, checkpoint
from lct_fast.engine.exits import Evaluation
from lct_fast.engine.graphs import eager_lines
from lct_fast.engine.group import parameter_count
from lct_fast.engine.meter import Meter
from lct_fast.engine.trace import write_trace
from lct_fast.report import plot_curves


def add_parser(subparsers: Any) -> None:
    """Registers ``train``."""
    parser: argparse.ArgumentParser = subparsers.add_parser("train", help="train a network cut into groups")
    parser.add_argument("--config", type=Path, help="YAML file of options; flags win over it")
    parser.add_argument("--out", type=Path, help="run folder (default runs/DATA-METHOD-seedS)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs ``train``; 0 when the run is complete."""
    options = given(args)
    fresh = resolve(options)
    out = args.out or Path("runs") / f"{fresh.data.partition(':')[0]}-{fresh.method}-seed{fresh.seed}"
    folder = RunFolder(out)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume = args.resume or (restarted and (out / "config.yaml").exists())
    config = folder.reopen(options) if resume else fresh
    processes.check(config)
    summary = train(config, folder, resume=resume, quiet=args.json)
    if summary is None:
        return 0
    if args.json:
        print(json.dumps(summary))
    else:
        exits = "  ".join(f"exit {k} {a:.2%}" for k, a in enumerate(summary["exit_test_accuracy"], 1))
        print(f"{summary['method']}: test accuracy {summary['test_accuracy']:.2%}  ({exits})")
        step = summary["step_seconds_median"]
        pace = "" if step is None else f", {step * 1e3:.1f} ms a step"
        print(f"{summary['seconds']:.0f} s{pace}; run folder {out}")
    return 0


def train(
    config: Config, folder: RunFolder, *, resume: bool = False, quiet: bool = False
) -> dict[str, Any] | None:
    """Trains as ``config`` says and returns the summary that is also written to the folder.

    Under torchrun every process calls it; the last group's process writes the records and gets the summary, the
    others get None.
    """
    devices = build.set_up(config)
    several = processes.count() > 1
    if several:
        devices = [processes.join(devices)]
    images = build.load_data(config) if processes.is_first() else None
    facts = processes.from_first(build.facts(config, images) if images else None)
    found = processes.from_first(checkpoint.latest(folder.checkpoints) if resume else None)
    groups, config.split = build.build_groups(config, facts, devices[0], processes.from_first)
    per_epoch = facts.train_images // config.batch_size
    steps = build.total_steps(config, per_epoch)
    trainer = build.build_trainer(config, groups, devices, steps)
    if trainer.ranks is not None and trainer.first and not quiet:
        _print_map(trainer)
    told = _tell_eager(config, trainer, [], quiet)
    recorder = Recorder(config, folder, trainer, per_epoch, steps, quiet)
    if found is not None:
        recorder.restore(checkpoint.load(trainer, found))
    if resume and trainer.batch >= steps and folder.summary.exists():
        loop.end(trainer)
        processes.leave()
        return json.loads(folder.summary.read_text()) if trainer.last else None
    if trainer.first and not resume:
        folder.create(config)
    processes.from_first(None)
    if trainer.last:
        folder.open(trainer.batch)
    try:
        if images is None:
            result = loop.follow(trainer, recorder, folder.checkpoints)
        else:
            batches = build.training_batches(config, images, devices[0])
            test = build.test_batches(config, images, devices[0])
            run = loop.drive if several else loop.run_here
            result = run(config, trainer, recorder, batches, test, folder.checkpoints)
    finally:
        folder.close()
    # What only shows when it is recorded.
    _tell_eager(config, trainer, told, quiet)
    meter, offsets = trainer.gather_meter()
    processes.leave()
    if result is None:
        return None
    summary = _summary(config, trainer, meter, recorder, result, facts.name)
    write_trace(folder.path / "trace.json", meter.groups, offsets)
    plot_curves(folder.path, folder.path / "curves.png")
    folder.write_summary(summary)
    return summary


def _print_map(trainer: Trainer) -> None:
    assert trainer.ranks is not None
    for k, (group, place) in enumerate(zip(trainer.groups, trainer.ranks.places, strict=True)):
        units = f"{group.units[0]} .. {group.units[-1]}" if len(group.units) > 1 else group.units[0]
        print(f"group {k + 1} ({units}) on rank {k}: {place}", flush=True)


def _tell_eager(config: Config, trainer: Trainer, told: list[str], quiet: bool) -> list[str]:
    """Prints why groups run without CUDA graphs, but for what was told."""
    lines = [] if config.graphs == "off" else eager_lines(trainer.workers)
    for line in lines:
        if line not in told and not quiet:
            print(line, flush=True)
    return lines


def _summary(
    config: Config, trainer: Trainer, meter: Meter, recorder: Recorder, result: Evaluation, data_name: str
) -> dict[str, Any]:
    on_cpu = all(w.device.type == "cpu" for w in trainer.workers)
    # One process that runs one group after the other has no pipeline to have a bubble or a transfer to hide.
    timed = on_cpu and trainer.ranks is not None
    return {
        "method": config.method,
        "model": config.model,
        "data": data_name,
        "groups": len(trainer.groups),
        "split": config.split if len(trainer.groups) > 1 else [],
        "critic": config.critic if len(trainer.groups) > 1 else None,
        "codec": " ".join(config.codec),
        "schedule": config.schedule,
        "feedback_delay": trainer.settings.feedback_delay if trainer.method.uses_feedback else None,
        "processes": processes.count(),
        "seed": config.seed,
        "steps": trainer.batch,
        "epochs": config.epochs,
        "test_accuracy": result.accuracy[-1],
        "exit_test_accuracy": result.accuracy,
        "step_seconds_median": meter.step_seconds_median(),
        "seconds": recorder.seconds,
        "wire_bytes_per_sample": meter.per_sample(meter.wire_bytes),
        "raw_bytes_per_sample": meter.per_sample(meter.raw_bytes),
        "feedback_bytes_per_sample": meter.per_sample(meter.feedback_bytes),
        "bubble_fraction": meter.bubble_fraction() if timed else None,
        "exposed_transfer_fraction": meter.exposed_transfer_fraction() if timed else None,
        "efficiency": meter.efficiency() if timed else None,
        "imbalance": meter.imbalance() if on_cpu else None,
        "critic_tax": meter.critic_tax() if on_cpu else None,
        "parameters": sum(parameter_count(g) for g in trainer.groups),
        "device": ", ".join(sorted({device_name(w.device) for w in trainer.workers})),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }
