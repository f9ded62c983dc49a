"""lct-fast train: a run from options to summary, resumable."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lct_fast.cli import build
from lct_fast.cli.config import Config, add_arguments, given, resolve
from lct_fast.cli.info import commit, device_name, versions
from lct_fast.cli.run_folder import RunFolder
from lct_fast.data import Batches
from lct_fast.engine import Trainer, checkpoint
from lct_fast.engine.group import parameter_count
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
    summary = train(config, folder, resume=resume, quiet=args.json)
    if args.json:
        print(json.dumps(summary))
    else:
        exits = "  ".join(f"exit {k} {a:.2%}" for k, a in enumerate(summary["exit_test_accuracy"], 1))
        print(f"{summary['method']}: test accuracy {summary['test_accuracy']:.2%}  ({exits})")
        step = summary["step_seconds_median"]
        pace = "" if step is None else f", {step * 1e3:.1f} ms a step"
        print(f"{summary['seconds']:.0f} s{pace}; run folder {out}")
    return 0


def train(config: Config, folder: RunFolder, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains as ``config`` says and returns the summary that is also written to the folder."""
    devices = build.set_up(config)
    images = build.load_data(config)
    batches = build.training_batches(config, images, devices[0])
    test = build.test_batches(config, images, devices[0])
    groups = build.build_groups(config, images, devices[0])
    steps = build.total_steps(config, len(batches))
    trainer = build.build_trainer(config, groups, devices, steps)
    loop = Loop(config, folder, trainer, batches, test, steps, quiet)
    if resume:
        found = checkpoint.latest(folder.checkpoints)
        if found is not None:
            loop.restore(checkpoint.load(trainer, found))
        if trainer.batch >= steps and folder.summary.exists():
            folder.close()
            return json.loads(folder.summary.read_text())
        folder.rewind(trainer.batch)
    else:
        folder.create(config)
    try:
        loop.run()
    finally:
        folder.close()
    trainer.flush()
    # After flush no feedback is owed, so this is what evaluation and export read.
    checkpoint.save(trainer, folder.checkpoints, loop.position())
    summary = _summary(config, trainer, loop, images.name)
    trainer.meter.write_trace(folder.path / "trace.json")
    plot_curves(folder.path, folder.path / "curves.png")
    folder.write_summary(summary)
    return summary


class Loop:
    """Epochs and batches with logging, evaluation and checkpoints at marked batches."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        trainer: Trainer,
        batches: Batches,
        test: Batches,
        steps: int,
        quiet: bool,
    ) -> None:
        self.config, self.folder, self.trainer = config, folder, trainer
        self.batches, self.test, self.steps, self.quiet = batches, test, steps, quiet
        self.seconds = 0.0
        self.interval: list[torch.Tensor] = []
        self.epoch_sum = torch.zeros(len(trainer.groups))
        self.epoch_count = 0
        self.last: dict[str, Any] = {}

    def position(self) -> dict[str, Any]:
        """What a resumed run needs besides the trainer's state."""
        return {
            "seconds": self.seconds,
            "interval": [losses.tolist() for losses in self.interval],
            "epoch_sum": self.epoch_sum.tolist(),
            "epoch_count": self.epoch_count,
            "last": self.last,
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Takes up a position saved by ``position``."""
        self.seconds = position["seconds"]
        self.interval = [torch.tensor(losses) for losses in position["interval"]]
        self.epoch_sum = torch.tensor(position["epoch_sum"])
        self.epoch_count = position["epoch_count"]
        self.last = position["last"]

    def run(self) -> None:
        """Trains to the end."""
        per_epoch = len(self.batches)
        with tqdm(
            total=self.steps, initial=self.trainer.batch, unit="batch", disable=self.quiet or None
        ) as bar:
            while self.trainer.batch < self.steps:
                epoch, start = divmod(self.trainer.batch, per_epoch)
                self._epoch(epoch, start, bar)

    def _epoch(self, epoch: int, start: int, bar: Any) -> None:
        clock = time.perf_counter()
        for index, x, y in self.batches.epoch(epoch, start):
            losses = self.trainer.step(x, y).losses.cpu()
            self.interval.append(losses)
            self.epoch_sum += losses
            self.epoch_count += 1
            bar.update()
            done = self.trainer.batch
            ends = index + 1 == len(self.batches) or done == self.steps
            if done % self.config.log_every == 0 or ends:
                now = time.perf_counter()
                self.seconds += now - clock
                clock = now
                self._log_interval(epoch, bar)
            if ends:
                self._log_epoch(epoch)
                clock = time.perf_counter()
            every = self.config.checkpoint_every
            if done < self.steps and (done % every == 0 if every else ends):
                checkpoint.save(self.trainer, self.folder.checkpoints, self.position())
                clock = time.perf_counter()
            if done == self.steps:
                return

    def _log_interval(self, epoch: int, bar: Any) -> None:
        losses = torch.stack(self.interval).mean(0).tolist()
        self.interval = []
        seconds = self.trainer.meter.step_seconds_median() or 0.0
        optimizer = self.trainer.workers[0].optimizer
        self.folder.log(
            {
                "kind": "interval",
                "step": self.trainer.batch,
                "epoch": epoch + 1,
                "seconds": self.seconds,
                "loss": losses,
                "lr": float(optimizer.param_groups[0]["lr"]) if optimizer else None,
                "samples_per_second": self.config.batch_size / seconds if seconds else None,
            }
        )
        bar.set_postfix_str("loss " + " ".join(f"{v:.3f}" for v in losses))

    def _log_epoch(self, epoch: int) -> None:
        result = self.trainer.evaluate((x, y) for _, x, y in self.test.epoch(0))
        self.last = {
            "kind": "epoch",
            "epoch": epoch + 1,
            "step": self.trainer.batch,
            "seconds": self.seconds,
            "train_loss": (self.epoch_sum / max(self.epoch_count, 1)).tolist(),
            "test_loss": result.loss,
            "exit_test_accuracy": result.accuracy,
            "test_accuracy": result.accuracy[-1],
        }
        self.folder.log(self.last)
        self.epoch_sum.zero_()
        self.epoch_count = 0
        if not self.quiet:
            exits = " ".join(f"{a:.2%}" for a in result.accuracy)
            tqdm.write(
                f"epoch {epoch + 1:3d}  batch {self.trainer.batch:6d}  test accuracy of the exits: {exits}"
            )


def _summary(config: Config, trainer: Trainer, loop: Loop, data_name: str) -> dict[str, Any]:
    meter = trainer.meter
    on_cpu = all(w.device.type == "cpu" for w in trainer.workers)
    result = trainer.evaluate((x, y) for _, x, y in loop.test.epoch(0))
    return {
        "method": config.method,
        "model": config.model,
        "data": data_name,
        "groups": len(trainer.groups),
        "split": config.split if len(trainer.groups) > 1 else [],
        "critic": config.critic if len(trainer.groups) > 1 else None,
        "codec": config.codec,
        "schedule": config.schedule,
        "seed": config.seed,
        "steps": trainer.batch,
        "epochs": config.epochs,
        "test_accuracy": result.accuracy[-1],
        "exit_test_accuracy": result.accuracy,
        "step_seconds_median": meter.step_seconds_median(),
        "seconds": loop.seconds,
        "wire_bytes_per_sample": meter.per_sample(meter.wire_bytes),
        "raw_bytes_per_sample": meter.per_sample(meter.raw_bytes),
        "feedback_bytes_per_sample": meter.per_sample(meter.feedback_bytes),
        # One process runs one group after the other: there is no pipeline to have a bubble or a transfer to hide.
        "bubble_fraction": None,
        "exposed_transfer_fraction": None,
        "critic_tax": meter.critic_tax() if on_cpu else None,
        "parameters": sum(parameter_count(g) for g in trainer.groups),
        "device": ", ".join(sorted({device_name(w.device) for w in trainer.workers})),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
    }
