"""lct-fast train: a run from options to summary, resumable."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lct_fast.bench.machine import commit, versions
from lct_fast.cli import build, cuts, loop, processes
from lct_fast.cli.config import Config, add_arguments, given, resolve
from lct_fast.cli.costs import critic_mac_share
from lct_fast.cli.info import device_name
from lct_fast.cli.recorder import Recorder
from lct_fast.cli.run_folder import RunFolder
from lct_fast.data import TextData
from lct_fast.engine import CheckpointError, Trainer, checkpoint
from lct_fast.engine.diagnosis import late_means, rows
from lct_fast.engine.meter import Meter
from lct_fast.engine.network.group import parameter_count
from lct_fast.engine.schedules.graphs import eager_lines
from lct_fast.engine.trace import write_trace
from lct_fast.report import plot_curves
from lct_fast.report.run import exit_name


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
    restarted = processes.meet(fresh.start_timeout)
    resume = args.resume or (restarted and (out / "config.yaml").exists())
    config = folder.reopen(options) if resume else fresh
    processes.check(config)
    try:
        summary = train(config, folder, resume=resume, quiet=args.json)
    finally:
        folder.unlock()
    if summary is None:
        return 0
    if args.json:
        print(json.dumps(summary))
    else:
        accuracy = summary["exit_test_accuracy"]
        exits = "  ".join(f"{exit_name(k, len(accuracy))} {a:.2%}" for k, a in enumerate(accuracy, 1))
        print(f"{summary['method']}: test accuracy {summary['test_accuracy']:.2%}  ({exits})")
        if "exit_bits_per_character" in summary:
            bits = summary["exit_bits_per_character"]
            exits = "  ".join(f"{exit_name(k, len(bits))} {b:.3f}" for k, b in enumerate(bits, 1))
            print(f"bits per character: {exits}")
        step = summary["step_seconds_median"]
        pace = "" if step is None else f", {step * 1e3:.1f} ms a step"
        print(f"{summary['seconds']:.0f} s{pace}; run folder {out}")
    return 0


def train(
    config: Config, folder: RunFolder, *, resume: bool = False, quiet: bool = False
) -> dict[str, Any] | None:
    """Trains as ``config`` says and returns the summary that is also written to the folder.

    Under torchrun every process calls it; the last group's process, of replica 0, writes the records and gets the
    summary, the others get None.
    """
    devices = build.set_up(config)
    several = processes.count() > 1
    if several:
        devices = [processes.join(devices, config.start_timeout)]
    vocabulary = folder.vocabulary() if resume else None
    images = build.load_data(config, vocabulary) if processes.reads_data(config) else None
    facts = processes.from_first(build.facts(config, images) if images else None)
    found = None
    if resume and processes.is_first():
        folder.lock()
        found = checkpoint.whole(folder.checkpoints, _warn)
        checkpoint.sweep(folder.checkpoints)
    found = processes.from_first(found)
    groups, config.split = build.build_groups(config, facts, devices[0], processes.from_first)
    per_epoch = facts.per_epoch
    steps = build.total_steps(config, per_epoch)
    config.serial_block = build.serial_block(config, per_epoch)
    trainer = build.build_trainer(config, groups, devices, steps, facts.samples, folder.path / "lambda")
    if "auto" in config.codec:
        # A resumed run keeps what was chosen.
        config.codec = trainer.wires or ["none"]
        if processes.is_first() and not quiet:
            _print_choices(trainer)
    if processes.is_first() and not quiet:
        _print_map(trainer)
    if config.diagnose and config.schedule != "lockstep" and processes.is_first() and not quiet:
        print(
            "diagnose: gradient norms only, as cosines to the true gradient are taken in lockstep", flush=True
        )
    if resume and processes.is_first() and not quiet:
        print(f"goes on from {found}" if found else "there is no checkpoint yet: begins anew", flush=True)
    told = _tell_eager(config, trainer, [], quiet)
    recorder = Recorder(config, folder, trainer, per_epoch, steps, quiet, facts.text)
    if found is not None:
        recorder.restore(checkpoint.load(trainer, found))
    if resume and trainer.batch >= steps and folder.summary.exists():
        loop.end(trainer)
        processes.leave()
        return json.loads(folder.summary.read_text()) if trainer.reports else None
    if processes.is_first() and not resume:
        folder.create(config)
        if isinstance(images, TextData):
            folder.write_vocabulary(images.vocabulary)
    processes.from_first(None)
    if trainer.reports:
        folder.open(recorder.done, trainer.batch)
    try:
        if images is None:
            result = loop.follow(trainer, recorder, folder.checkpoints)
        else:
            batches = build.training_batches(config, images, devices[0])
            test = build.test_batches(config, images, devices[0])
            run = loop.drive if several else loop.run_here
            result = run(config, trainer, recorder, batches, test, folder.checkpoints)
    except BaseException:
        if not several:
            # What was begun needs nobody else to be completed.
            with suppress(CheckpointError):
                trainer.finish_saving()
        raise
    finally:
        folder.close()
    # What only shows when it is recorded.
    _tell_eager(config, trainer, told, quiet)
    meter, offsets = trainer.gather_meter()
    processes.leave()
    if result is None:
        return None
    summary = _summary(config, trainer, meter, recorder, result, facts.name)
    summary["diagnosis"] = _diagnosis(config, meter, folder)
    for record in cuts.codebook_records(meter, per_epoch):
        folder.log(record)
    write_trace(folder.path / "trace.json", meter.groups, offsets)
    plot_curves(folder.path, folder.path / "curves.png")
    folder.write_summary(summary)
    return summary


def _warn(line: str) -> None:
    print(f"lct-fast train: {line}", file=sys.stderr, flush=True)


def _print_map(trainer: Trainer) -> None:
    if trainer.ranks is None:
        return
    for rank, place in enumerate(trainer.ranks.everywhere):
        replica, k = divmod(rank, len(trainer.groups))
        units = trainer.groups[k].units
        named = f"{units[0]} .. {units[-1]}" if len(units) > 1 else units[0]
        of = f" of replica {replica}" if trainer.replicas > 1 else ""
        print(f"group {k + 1} ({named}){of} on rank {rank}: {place}", flush=True)


def _print_choices(trainer: Trainer) -> None:
    for k, choice in enumerate(trainer.choices, 1):
        if choice is not None:
            print(f"cut {k}: codec {choice.codec}: {choice.reason}", flush=True)


def _serial(trainer: Trainer, meter: Meter) -> dict[str, Any] | None:
    """What the serial steps were and cost; their bytes are in ``wire_bytes_per_sample`` too."""
    hybrid = trainer.hybrid
    if hybrid is None:
        return None
    return {
        "share": hybrid.share,
        "block": hybrid.block,
        "microbatches": hybrid.microbatches,
        "steps": meter.serial_steps,
        "bytes_per_sample": meter.per_sample(meter.serial_bytes),
        "seconds": meter.serial_seconds,
    }


def _speed_up(trainer: Trainer, meter: Meter) -> dict[str, float] | None:
    """What groups at once gain, from the groups' own times, and what is left of it with the serial steps."""
    if not all(g.timed() for g in meter.groups):
        return None
    busy = [g.busy / g.timed() for g in meter.groups]
    gain, share = sum(busy) / max(busy), trainer.hybrid.share if trainer.hybrid else 0.0
    return {"parallel_gain": gain, "serial_share": share, "overall": 1 / (share + (1 - share) / gain)}


def _diagnosis(config: Config, meter: Meter, folder: RunFolder) -> dict[str, Any] | None:
    """Writes what was read of all groups' gradients, and returns its means over the last quarter."""
    if not config.diagnose:
        return None
    table = rows([group.readings for group in meter.groups])
    for row in table:
        step = row.pop("batch") + 1
        folder.log({"kind": "diagnosis", "step": step, **row})
    keys = ("gradient_norm", "gradient_cosine")
    return {"every": config.diagnose, "readings": len(table), **{key: late_means(table, key) for key in keys}}


def _tell_eager(config: Config, trainer: Trainer, told: list[str], quiet: bool) -> list[str]:
    """Prints why groups run without CUDA graphs, but for what was told."""
    lines = [] if config.graphs == "off" else eager_lines(trainer.workers)
    for line in lines:
        if line not in told and not quiet:
            print(line, flush=True)
    return lines


def _summary(
    config: Config, trainer: Trainer, meter: Meter, recorder: Recorder, result: loop.Final, data_name: str
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
        "critic": config.critic if len(trainer.groups) > 1 and trainer.method.uses_critics else None,
        "codec": " ".join(config.codec),
        "codec_choices": [
            c and {"codec": c.codec, "predicted_seconds": c.predicted} for c in trainer.choices
        ],
        "schedule": config.schedule,
        "feedback_delay": trainer.settings.feedback_delay if trainer.method.uses_feedback else None,
        "processes": processes.count(),
        "replicas": trainer.replicas,
        "seed": config.seed,
        "steps": recorder.steps,
        "epochs": config.epochs,
        "test_accuracy": result.plain.accuracy[-1],
        "exit_test_accuracy": result.plain.accuracy,
        "exit_test_loss": result.plain.loss,
        **recorder.bits(result.plain),
        "coded_exit_test_accuracy": result.coded and result.coded.accuracy,
        "step_seconds_median": meter.step_seconds_median(),
        "seconds": recorder.seconds,
        "wire_bytes_per_sample": meter.per_sample(meter.wire_bytes),
        "raw_bytes_per_sample": meter.per_sample(meter.raw_bytes),
        "feedback_bytes_per_sample": meter.per_sample(meter.feedback_bytes),
        "cuts": cuts.summary(trainer.wires, meter),
        "serial": _serial(trainer, meter),
        "speed_up": _speed_up(trainer, meter) if on_cpu and trainer.method.sample_state else None,
        "bubble_fraction": meter.bubble_fraction() if timed else None,
        "exposed_transfer_fraction": meter.exposed_transfer_fraction() if timed else None,
        "efficiency": meter.efficiency() if timed else None,
        "imbalance": meter.imbalance() if on_cpu else None,
        "critic_tax": meter.critic_tax() if on_cpu else None,
        "critic_mac_share": critic_mac_share(trainer.groups),
        "replay": meter.replay() if config.schedule == "async" else None,
        "parameters": sum(parameter_count(g) for g in trainer.groups),
        "device": ", ".join(sorted({device_name(w.device) for w in trainer.workers})),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }
