"""What a run writes while it trains: intervals, epochs, the progress bar."""

from __future__ import annotations

import math
import time
from math import isnan, nan
from typing import Any

import torch
from tqdm import tqdm

from lct_fast.cli.config import Config
from lct_fast.cli.run_folder import RunFolder
from lct_fast.engine import Stats, Trainer
from lct_fast.engine.network.exits import Evaluation
from lct_fast.engine.worker import learning_rate


def bits_per_character(loss: float) -> float:
    """A mean cross-entropy in nats as bits."""
    return loss / math.log(2)


class Recorder:
    """Keeps and writes the losses of finished batches, in order; in the process that trains the last group.

    Args:
        per_epoch: batches of an epoch. steps: batches of the run. text: whether the data is one.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        trainer: Trainer,
        per_epoch: int,
        steps: int,
        quiet: bool,
        text: bool = False,
    ) -> None:
        self.text = text
        self.config, self.folder, self.trainer, self.quiet = config, folder, trainer, quiet
        self.per_epoch, self.steps = per_epoch, steps
        self.done = trainer.batch
        self.seconds = 0.0
        # Losses are read when they are written somewhere: until then no device is waited for.
        self.unread: list[Stats] = []
        self.interval: list[torch.Tensor] = []
        self.epoch_sum = torch.zeros(len(trainer.groups))
        self.epoch_count = torch.zeros(len(trainer.groups))
        self.bar: Any = None

    def position(self) -> dict[str, Any]:
        """What a resumed run needs besides the trainer's state."""
        self._read()
        return {
            "done": self.done,
            "seconds": self.seconds,
            "interval": [[None if isnan(v) else v for v in losses.tolist()] for losses in self.interval],
            "epoch_sum": self.epoch_sum.tolist(),
            "epoch_count": self.epoch_count.tolist(),
        }

    def restore(self, position: dict[str, Any]) -> None:
        """Takes up a position saved by ``position``."""
        self.done = position.get("done", self.trainer.batch)
        self.seconds = position["seconds"]
        self.interval = [
            torch.tensor([nan if v is None else v for v in losses]) for losses in position["interval"]
        ]
        self.epoch_sum = torch.tensor(position["epoch_sum"])
        self.epoch_count = torch.tensor(position["epoch_count"])

    def begin(self) -> None:
        """Training begins now."""
        # Until the slow group of a simulation is done.
        total = math.ceil(self.steps * self.config.slow_down)
        self.bar = tqdm(total=total, initial=self.done, unit="batch", disable=self.quiet or None)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Training goes on now; what came before (evaluation, a checkpoint) is not counted."""
        self._clock = time.perf_counter()

    def record(self, stats: Stats) -> None:
        """A batch has been through all groups; those a pipeline has not filled yet are passed over."""
        if stats.batch < 0:
            return
        self.unread.append(stats)
        self.done = stats.batch + 1
        self.bar.update()
        if self.done % self.config.log_every == 0 or self.ends_epoch(self.done):
            now = time.perf_counter()
            self.seconds += now - self._clock
            self._clock = now
            self._log_interval()

    def ends_epoch(self, done: int) -> bool:
        """Whether an epoch, or the run, is over after ``done`` batches."""
        return done % self.per_epoch == 0 or done == self.steps

    def epoch(self, result: Evaluation) -> None:
        """The epoch's evaluation is there."""
        self._read()
        # Of the first group; when groups go at their own pace, the last one is elsewhere, or has finished.
        batch = self.trainer.batch
        epoch = -(-batch // self.per_epoch)
        self.folder.log(
            {
                "kind": "epoch",
                "epoch": epoch,
                "step": batch,
                "seconds": self.seconds,
                "train_loss": (self.epoch_sum / self.epoch_count).tolist(),
                "test_loss": result.loss,
                "exit_test_accuracy": result.accuracy,
                "test_accuracy": result.accuracy[-1],
                **self.bits(result),
            }
        )
        self.epoch_sum.zero_()
        self.epoch_count.zero_()
        if not self.quiet:
            exits = " ".join(f"{a:.2%}" for a in result.accuracy)
            told = f"test accuracy of the exits: {exits}"
            if self.text:
                told = f"bits per character: {' '.join(f'{bits_per_character(v):.3f}' for v in result.loss)}"
            tqdm.write(f"epoch {epoch:3d}  batch {batch:6d}  {told}")
        self.restart_clock()

    def bits(self, result: Evaluation) -> dict[str, list[float]]:
        """Of a text, what records say beside the loss."""
        if not self.text:
            return {}
        return {"exit_bits_per_character": [bits_per_character(v) for v in result.loss]}

    def end(self) -> None:
        """Training is over."""
        if self.bar is not None:
            self.bar.close()

    def _read(self) -> None:
        for stats in self.unread:
            losses = stats.losses.cpu()
            self.interval.append(losses)
            # A serial step knows the last exit's alone.
            self.epoch_sum += losses.nan_to_num(0.0)
            self.epoch_count += ~losses.isnan()
        self.unread = []

    def _log_interval(self) -> None:
        self._read()
        losses = torch.stack(self.interval).nanmean(0).tolist()
        self.interval = []
        seconds = self.trainer.meter.step_seconds_median() or 0.0
        self.folder.log(
            {
                "kind": "interval",
                "step": self.done,
                "epoch": -(-self.done // self.per_epoch),
                "seconds": self.seconds,
                "loss": losses,
                "lr": learning_rate(reversed(self.trainer.workers)),
                # Of a text, characters.
                "samples_per_second": self.config.batch_size * (self.config.window or 1) / seconds
                if seconds
                else None,
            }
        )
        self.bar.set_postfix_str("loss " + " ".join("-" if isnan(v) else f"{v:.3f}" for v in losses))
