"""Epochs, evaluation and checkpoints: in one process, or as driver and followers of a pipeline over processes."""

from __future__ import annotations

from pathlib import Path

from lct_fast.cli.config import Config
from lct_fast.cli.recorder import Recorder
from lct_fast.data import Batches
from lct_fast.engine import Mark, Stats, Trainer, checkpoint
from lct_fast.engine.exits import Evaluation

# Marks in the stream of a pipelined run.
_CHECKPOINT, _FLUSHED = 1, 2


def run_here(
    config: Config, trainer: Trainer, recorder: Recorder, batches: Batches, test: Batches, checkpoints: Path
) -> Evaluation:
    """Trains to the end in this process, and returns the evaluation of what was trained."""
    recorder.begin()
    while trainer.batch < recorder.steps:
        epoch, start = divmod(trainer.batch, len(batches))
        for _, x, y in batches.epoch(epoch, start):
            recorder.record(trainer.step(x, y))
            done = trainer.batch
            ends, saves = recorder.ends_epoch(done), _saves(config, recorder, done)
            if ends or saves:
                for stats in trainer.drain():
                    recorder.record(stats)
            if ends:
                recorder.epoch(_result(trainer, test))
            if saves:
                checkpoint.save(trainer, checkpoints, recorder.position(), wait=False)
                recorder.restart_clock()
            if done == recorder.steps:
                break
    recorder.end()
    trainer.flush()
    # After flush no feedback is owed, so this is what evaluation and export read.
    checkpoint.save(trainer, checkpoints, recorder.position())
    return _result(trainer, test)


def drive(
    config: Config, trainer: Trainer, recorder: Recorder, batches: Batches, test: Batches, checkpoints: Path
) -> None:
    """As ``run_here``, in the process of the first group: the others ``follow``."""

    def save() -> None:
        checkpoint.save(trainer, checkpoints, wait=False)
        trainer.mark(_CHECKPOINT)

    while trainer.batch < recorder.steps:
        epoch, start = divmod(trainer.batch, len(batches))
        for _, x, y in batches.epoch(epoch, start):
            trainer.step(x, y)
            done = trainer.batch
            if recorder.ends_epoch(done):
                trainer.evaluate((x, y) for _, x, y in test.epoch(0))
            if _saves(config, recorder, done):
                save()
            if done == recorder.steps:
                break
    trainer.flush()
    trainer.mark(_FLUSHED)
    save()
    trainer.evaluate((x, y) for _, x, y in test.epoch(0))
    trainer.stop()


def follow(trainer: Trainer, recorder: Recorder, checkpoints: Path) -> Evaluation | None:
    """Trains one of the other groups to the end; the last group's process gets the final evaluation."""
    result, flushed = None, False
    if trainer.last:
        recorder.begin()
    for event in trainer.events():
        if isinstance(event, Mark):
            if event.code == _FLUSHED:
                flushed = True
            else:
                checkpoint.save(trainer, checkpoints, recorder.position(), wait=False)
                recorder.restart_clock()
        elif isinstance(event, Stats):
            if trainer.last:
                recorder.record(event)
        elif flushed:
            result = event
        else:
            recorder.epoch(event)
    recorder.end()
    return result


def end(trainer: Trainer) -> None:
    """Ends a run in which nothing is left to do."""
    if trainer.ranks is None:
        return
    if trainer.first:
        trainer.stop()
    else:
        list(trainer.events())


def _saves(config: Config, recorder: Recorder, done: int) -> bool:
    """Whether a checkpoint is due after ``done`` batches; the last one comes after the flush."""
    every = config.checkpoint_every
    return done < recorder.steps and (done % every == 0 if every else recorder.ends_epoch(done))


def _result(trainer: Trainer, test: Batches) -> Evaluation:
    result = trainer.evaluate((x, y) for _, x, y in test.epoch(0))
    assert result is not None, "in one process evaluate returns its result"
    return result
