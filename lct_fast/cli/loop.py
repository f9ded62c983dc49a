"""Epochs, evaluation and checkpoints: in one process, or as driver and followers of a pipeline over processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from lct_fast.cli.config import Config
from lct_fast.cli.recorder import Recorder
from lct_fast.data import Batches, Windows
from lct_fast.engine import Mark, Stats, Trainer, checkpoint
from lct_fast.engine.network.exits import Evaluation
from lct_fast.engine.transport.replicas import part

# Marks in the stream of a pipelined run.
_CHECKPOINT, _FLUSHED = 1, 2


@dataclass(frozen=True, slots=True)
class Final:
    """Evaluation of what was trained; ``coded`` with codecs on the cuts as in training, None where they are exact."""

    plain: Evaluation
    coded: Evaluation | None


def run_here(
    config: Config,
    trainer: Trainer,
    recorder: Recorder,
    batches: Batches | Windows,
    test: Batches | Windows,
    checkpoints: Path,
) -> Final:
    """Trains to the end in this process, and returns the evaluation of what was trained."""
    recorder.begin()
    while not _over(trainer, recorder):
        epoch, start = divmod(trainer.batch, len(batches))
        if start == 0:
            trainer.begin_sequence()
        for index, x, y in batches.epoch(epoch, start):
            recorder.record(trainer.step(x, y, _samples(trainer, batches, epoch, index)))
            done, over = trainer.batch, _over(trainer, recorder)
            ends, saves = recorder.ends_epoch(done) or over, not over and _saves(config, recorder, done)
            if ends or saves:
                for stats in trainer.drain():
                    recorder.record(stats)
            if ends:
                recorder.epoch(_result(trainer, test))
            if saves:
                checkpoint.save(trainer, checkpoints, recorder.position(), wait=False)
                recorder.restart_clock()
            if over:
                break
    recorder.end()
    trainer.flush()
    # After flush no feedback is owed, so this is what evaluation and export read.
    checkpoint.save(trainer, checkpoints, recorder.position())
    return Final(_result(trainer, test), _result(trainer, test, coded=True) if trainer.lossy else None)


def drive(
    config: Config,
    trainer: Trainer,
    recorder: Recorder,
    batches: Batches | Windows,
    test: Batches | Windows,
    checkpoints: Path,
) -> None:
    """As ``run_here``, in the process of the first group, on this replica's part: the others ``follow``."""
    share = partial(part, replica=trainer.replica, replicas=trainer.replicas)

    def save() -> None:
        checkpoint.save(trainer, checkpoints, wait=False)
        trainer.mark(_CHECKPOINT)

    while not _over(trainer, recorder):
        epoch, start = divmod(trainer.batch, len(batches))
        if start == 0:
            trainer.begin_sequence()
        for index, x, y in batches.epoch(epoch, start):
            trainer.step(share(x), share(y), _samples(trainer, batches, epoch, index))
            done, over = trainer.batch, _over(trainer, recorder)
            if recorder.ends_epoch(done) or over:
                trainer.evaluate((x, y) for _, x, y in test.epoch(0))
            if not over and _saves(config, recorder, done):
                save()
            if over:
                break
    trainer.flush()
    trainer.mark(_FLUSHED)
    save()
    trainer.evaluate((x, y) for _, x, y in test.epoch(0))
    if trainer.lossy:
        trainer.evaluate(((x, y) for _, x, y in test.epoch(0)), coded=True)
    trainer.stop()


def follow(trainer: Trainer, recorder: Recorder, checkpoints: Path) -> Final | None:
    """Trains one of the other groups to the end; the last group's process, of replica 0, gets the final evaluation."""
    results: list[Evaluation] = []
    flushed = False
    if trainer.reports:
        recorder.begin()
    for event in trainer.events():
        if isinstance(event, Mark):
            if event.code == _FLUSHED:
                flushed = True
            else:
                checkpoint.save(trainer, checkpoints, recorder.position(), wait=False)
                recorder.restart_clock()
        elif isinstance(event, Stats):
            if trainer.reports:
                recorder.record(event)
        elif flushed:
            results.append(event)
        else:
            recorder.epoch(event)
    recorder.end()
    return Final(results[0], results[1] if trainer.lossy else None) if results else None


def end(trainer: Trainer) -> None:
    """Ends a run in which nothing is left to do."""
    if trainer.ranks is None:
        return
    if trainer.first:
        trainer.stop()
    else:
        list(trainer.events())


def _samples(trainer: Trainer, batches: Batches | Windows, epoch: int, index: int) -> Tensor | None:
    """Which samples a batch holds, for a method that keeps something for each."""
    if not trainer.method.sample_state:
        return None
    assert isinstance(batches, Batches), "windows of a text have no number"
    return batches.samples(epoch, index)


def _over(trainer: Trainer, recorder: Recorder) -> bool:
    """Whether every group has made the run's updates; asynchronous ones take more batches than that."""
    return trainer.batch >= recorder.steps and trainer.finished


def _saves(config: Config, recorder: Recorder, done: int) -> bool:
    """Whether a checkpoint is due after ``done`` batches; the last one comes after the flush."""
    every = config.checkpoint_every
    return done % every == 0 if every else recorder.ends_epoch(done)


def _result(trainer: Trainer, test: Batches | Windows, coded: bool = False) -> Evaluation:
    result = trainer.evaluate(((x, y) for _, x, y in test.epoch(0)), coded)
    assert result is not None, "in one process evaluate returns its result"
    return result
